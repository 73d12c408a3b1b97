"""What a causal network remembers of the frames it has seen.

Keys are stored after normalisation and rotation by their absolute frame, so a
cached chunk reads them as they are (SPEC section 4).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Int
from crcm_jax.kernels._compat import target_platform
from crcm_jax.models._config import WanConfig
from crcm_jax.models._layers import KeysValues


class Cache(NamedTuple):
  """Keys and values of the past and of the prompt, for all layers.

  Frames are counted twice: `frames` says which slots are filled, `position`
  where the next frame stands in time. They are equal while nothing is evicted.
  """

  past: KeysValues
  """`[layers b f p n d]`, frames seen from slot 0 on; the rest is unread."""
  text: KeysValues | list[KeysValues]
  """`[layers b l n d]`, the prompt; of layers that lie apart, a list of each
  one's `[b l n d]`, from which no pass has to copy."""
  frames: Int[Array, ""]
  """int32, latent frames stored."""
  position: Int[Array, ""]
  """int32, absolute index of the next frame, which turns queries and keys."""

  def extended(self, own: KeysValues) -> "Cache":
    """Returns the cache with a chunk's keys and values.

    One write after the scan over layers, not one a layer inside it: there XLA
    would copy the whole cache, since a layer may read what it writes. Here the
    reads are over, and a donated cache is written in place.

    Args:
      own: the chunk's keys and values, `[layers b f p n d]`.
    """
    frames = own.keys.shape[2]

    def write(past: Array, new: Array) -> Array:
      return jax.lax.dynamic_update_slice_in_dim(past, new, self.frames, 2)

    return self._replace(
      past=KeysValues(*map(write, self.past, own)),
      frames=self.frames + frames,
      position=self.position + frames,
    )


def empty_past(
  config: WanConfig, batch: int, frames: int, tokens: int, dtype: Any
) -> KeysValues:
  """Allocates keys and values for `frames` frames of `tokens` tokens."""
  heads = (config.heads, config.head_width)
  shape = (config.layers, batch, frames, tokens, *heads)
  return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def attend_with_cache(
  attention: Callable[..., Array],
  q: Array,
  k: Array,
  v: Array,
  *,
  past: KeysValues,
  of_layer: KeysValues,
  layer: Int[Array, ""],
  ranges: Int[Array, "r 2"],
) -> Array:
  """Attends to a layer's own tokens and to its part of a cache.

  Args:
    attention: `kernels.attention`, or another of its signature.
    q: queries, `[b f p n d]`.
    k: keys of the layer's own tokens.
    v: values.
    past: keys and values of all layers, `[layers b f p n d]`.
    of_layer: those of this layer, which a scan over `past` hands out. It costs
      nothing where it is not used; indexing `past` here instead, the gradient
      would keep a second copy of it.
    layer: which layer it is.
    ranges: the tokens of a layer's cache that it sees.
  """
  joined = _as_one_sequence(past)
  if joined is not None:
    tokens = joined.keys.shape[1] // past.keys.shape[0]
    of_layer, ranges = joined, ranges + layer * tokens
  return attention(q, k, v, context=of_layer, context_ranges=ranges)


def _as_one_sequence(past: KeysValues) -> KeysValues | None:
  """Returns the past of all layers as one context, where that saves time.

  What a GPU kernel reads, a layer's slice included, must lie in memory: it
  would be copied, all of it in each call. A kernel that is told which tokens it
  may see can as well find its layer's within those of all layers.

  Args:
    past: keys and values, `[layers b f p n d]`.

  Returns:
    Keys and values, `[b (layers f p) n d]`; None where there are several
    videos, more than 32 bits of elements, or no such kernel.
  """
  one = past.keys.shape[1] == 1 and past.keys.size < 2**31
  if not one or target_platform() != "gpu":
    return None
  head = past.keys.shape[-2:]
  return KeysValues(*(a.reshape(1, -1, *head) for a in past))
