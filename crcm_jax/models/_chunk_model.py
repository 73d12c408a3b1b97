"""A `Wan` under one prompt, chunk by chunk: a `sampling.ChunkModel`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Int, Params
from crcm_jax.models._cache import Cache, empty_past
from crcm_jax.models._checks import check_conditioning
from crcm_jax.models._conditioning import (
  as_conditioning,
  Conditioning,
  frames_from,
  Text,
)
from crcm_jax.models._wan import Latents, Times, Wan


@dataclasses.dataclass(frozen=True, eq=False)
class WanChunks:
  """Generates one chunk after another against cached keys and values.

  Attributes:
    model: the network.
    text: embeddings of the prompts; of images too, with `Conditioning`.
    height: rows of a latent frame.
    width: columns of a latent frame.

  Example:
    >>> chunks = WanChunks(model, text, height=60, width=104)  # doctest: +SKIP
    >>> cache = chunks.init(params, batch=1, frames=21)  # doctest: +SKIP
    >>> v = chunks.velocity(params, x, t, cache)  # doctest: +SKIP
    >>> v, cache = chunks.append(params, x_0, 0 * t, cache)  # doctest: +SKIP
  """

  model: Wan
  text: Text | Conditioning
  _: dataclasses.KW_ONLY
  height: int
  width: int

  def init(self, params: Params, batch: int, frames: int) -> Cache:
    """Returns an empty cache with room for `frames`, prompt included.

    Gradient flows from the prompt's keys and values to `params`: call it
    inside the differentiated function where they shall learn.

    Args:
      params: parameters of the network.
      batch: number of videos; the prompts' batch.
      frames: latent frames the cache shall hold.

    Raises:
      ValueError: if the prompts do not fit the batch or the config.
    """
    config = self.model.config
    check_conditioning(config, as_conditioning(self.text), batch)
    text = self._apply("text_keys_values", params, self.text)
    tokens = config.tokens_per_frame(self.height, self.width)
    dtype = jax.tree.leaves(text)[0].dtype
    past = empty_past(config, batch, frames, tokens, dtype)
    start = jnp.zeros((), jnp.int32)
    cache = Cache(past=past, text=text, frames=start, position=start)
    return self._placed(cache)

  def velocity(
    self, params: Params, x: Latents, t: Times, cache: Cache
  ) -> Latents:
    """Predicts the next chunk's velocity; the cache is only read."""
    frames = self._frames(cache, x.shape[1])
    return self._apply("chunk", params, x, t, cache, frames)[0]

  def mean_velocity(
    self, params: Params, x: Latents, t: Times, end_time: Times, cache: Cache
  ) -> Latents:
    """Predicts the next chunk's mean velocity from `t` to `end_time`."""
    frames = self._frames(cache, x.shape[1])
    return self._apply("chunk", params, x, t, cache, frames, end_time)[0]

  def append(
    self, params: Params, x: Latents, t: Times, cache: Cache
  ) -> tuple[Latents, Cache]:
    """Stores the next chunk's keys and values, in place if donated.

    Nothing of it is differentiable, its velocity neither. The caller sees to
    it that the cache has room: its fill is known at run time only.
    """
    detached = jax.lax.stop_gradient((params, x, t, cache))
    frames = self._frames(cache, x.shape[1])
    v, own = self._apply("chunk", *detached, frames)
    # Placed before it is written: in a loop XLA would split the cache like it.
    own = self._placed(dict(past=own))["past"]
    return v, self._placed(cache.extended(own))

  def rewind(
    self, params: Params, cache: Cache, frames: Int[Array, ""]
  ) -> Cache:
    """Returns the cache as it was when `frames` frames were stored.

    The prompt's keys and values are computed anew, for their gradient.
    """
    text = self._apply("text_keys_values", params, self.text)
    return cache._replace(text=text, frames=frames, position=frames)

  def _placed(self, cache: Any) -> Any:
    place = self.model.place
    return cache if place is None else place("cache", cache)

  def _frames(self, cache: Cache, length: int) -> Array | None:
    """Returns what is known of the next frames."""
    known = as_conditioning(self.text).frames
    return frames_from(known, cache.position, length)

  def _apply(self, method: str, params: Params, *args: Any) -> Any:
    return self.model.apply({"params": params}, *args, method=method)
