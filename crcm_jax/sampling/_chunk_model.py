"""What a rollout needs of a network: one chunk, given a cache of the past.

A `ChunkModel` is one network under one conditioning (a caption): the
conditioning is part of the object, the parameters are arguments. Its cache
holds whatever the network keeps of the chunks committed so far; nobody but
the model looks inside. `guided` makes one such model of two.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable, TypeAlias

from crcm_jax import guidance
from crcm_jax._typing import Array, Float, Int, Params

Cache: TypeAlias = Any
"""A pytree of arrays whose shapes never change along a rollout."""


@runtime_checkable
class ChunkModel(Protocol):
  """One causal network under one conditioning, called chunk by chunk."""

  def init(self, params: Params, batch: int, frames: int) -> Cache:
    """Returns an empty cache, conditioning included.

    Args:
      params: the network's parameters. Gradients flow into them through what
        the cache keeps of the conditioning (a caption's keys and values).
      batch: number of videos.
      frames: latent frames that the cache must be able to hold.
    """
    ...

  def velocity(
    self,
    params: Params,
    x: Float[Array, "b f h w c"],
    t: Float[Array, "b f"],
    cache: Cache,
  ) -> Float[Array, "b f h w c"]:
    """Returns a chunk's velocity given the committed past; reads the cache.

    The chunk follows the committed frames directly. Gradients flow through
    the chunk's own keys and values and the conditioning's.
    """
    ...

  def append(
    self,
    params: Params,
    x: Float[Array, "b f h w c"],
    t: Float[Array, "b f"],
    cache: Cache,
  ) -> tuple[Float[Array, "b f h w c"], Cache]:
    """Commits a chunk to the cache, and returns its velocity on the way.

    No gradient flows through the velocity or the committed chunk; the cache
    keeps its conditioning as it is.
    """
    ...

  def rewind(
    self, params: Params, cache: Cache, frames: Int[Array, ""]
  ) -> Cache:
    """Returns the cache as it was when `frames` frames were committed.

    The conditioning is computed anew from `params`, for their gradient.
    """
    ...


@runtime_checkable
class MeanFlowChunkModel(ChunkModel, Protocol):
  """A chunk model that knows where its jumps end.

  Its `velocity` is the mean velocity down to data, time 0.
  """

  def mean_velocity(
    self,
    params: Params,
    x: Float[Array, "b f h w c"],
    t: Float[Array, "b f"],
    end_time: Float[Array, "b f"],
    cache: Cache,
  ) -> Float[Array, "b f h w c"]:
    """Returns a chunk's mean velocity from `t` to `end_time`."""
    ...


def guided(
  conditional: ChunkModel, unconditional: ChunkModel, scale: float
) -> ChunkModel:
  """Combines two chunk models by classifier-free guidance.

  The velocity is v_u + scale * (v_c - v_u). Each of the two keeps its own
  cache of the same guided past.

  Args:
    conditional: the model under the caption.
    unconditional: the same network under the null caption.
    scale: guidance scale. 1 means no guidance: the conditional model is
      returned as it is.

  Returns:
    A chunk model whose cache is the pair of their caches.

  References:
    Ho, Salimans, Classifier-free diffusion guidance, arXiv 2207.12598.
  """
  if scale == 1:
    return conditional
  return _Guided(conditional, unconditional, scale)


@dataclasses.dataclass(frozen=True)
class _Guided:
  """Two chunk models in step; `params` serves both."""

  conditional: ChunkModel
  unconditional: ChunkModel
  scale: float

  def init(self, params, batch, frames):
    return (
      self.conditional.init(params, batch, frames),
      self.unconditional.init(params, batch, frames),
    )

  def velocity(self, params, x, t, cache):
    conditional, unconditional = cache
    velocity = guidance.classifier_free(
      lambda x, t: self.conditional.velocity(params, x, t, conditional),
      lambda x, t: self.unconditional.velocity(params, x, t, unconditional),
      self.scale,
    )
    return velocity(x, t)

  def append(self, params, x, t, cache):
    v_c, conditional = self.conditional.append(params, x, t, cache[0])
    v_u, unconditional = self.unconditional.append(params, x, t, cache[1])
    velocity = guidance.classifier_free(
      lambda x, t: v_c, lambda x, t: v_u, self.scale
    )
    return velocity(x, t), (conditional, unconditional)

  def rewind(self, params, cache, frames):
    return (
      self.conditional.rewind(params, cache[0], frames),
      self.unconditional.rewind(params, cache[1], frames),
    )
