"""What a causal network remembers of the frames it has seen.

Keys are stored after normalisation and rotation by their absolute frame, so a
cached chunk reads them as they are (SPEC section 4).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Float, Int
from crcm_jax.models._layers import KeysValues


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values of the past and of the prompt, for all layers.

  Attributes:
    past: keys and values `[layers b y n d]` of the frames seen, filled from
      slot 0; the rest is unread.
    text: keys and values `[layers b l n d]` of the prompt.
    frames: latent frames stored so far.
    position: absolute index of the next frame, which turns its queries and
      keys. It equals `frames` while nothing is evicted.
  """

  past: KeysValues
  text: KeysValues
  frames: Int[Array, ""]
  position: Int[Array, ""]

  def extended(self, past: KeysValues, frames: int) -> "Cache":
    """Returns the cache after `frames` more were written to `past`."""
    return Cache(
      past=past,
      text=self.text,
      frames=self.frames + frames,
      position=self.position + frames,
    )


def empty_past(
  layers: int, batch: int, tokens: int, heads: int, head_width: int, dtype: Any
) -> KeysValues:
  """Allocates keys and values for `tokens` tokens."""
  shape = (layers, batch, tokens, heads, head_width)
  return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def read_layer(past: KeysValues, layer: Int[Array, ""]) -> KeysValues:
  """Returns the keys and values of one layer."""
  take = lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False)
  return KeysValues(*map(take, past))


def write_layer(
  past: KeysValues,
  layer: Int[Array, ""],
  slot: Int[Array, ""],
  own: KeysValues,
) -> KeysValues:
  """Writes a chunk's keys and values of one layer from token `slot` on.

  In a scan whose carry is `past` XLA writes in place; gradient stops here.
  """
  zero = jnp.zeros_like(slot)
  start = (zero + layer, zero, slot, zero, zero)

  def write(a: Float[Array, "layers b y n d"], new: Float[Array, "b s n d"]):
    new = jax.lax.stop_gradient(new)[None].astype(a.dtype)
    return jax.lax.dynamic_update_slice(a, new, start)

  return KeysValues(*map(write, past, own))
