"""Diffusion training of the causal teacher, on history as noisy as it comes.

Every chunk has its own time, and sees the chunks before it as noisy as they
are: loss = w(t) || v(x_t, t) - (noise - x_0) ||^2 under a block-causal mask.

References:
  Chen et al., Diffusion Forcing, arXiv 2407.01392.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from crcm_jax import losses, time_sampling
from crcm_jax._typing import Array, Bool, Float, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.time_sampling import ShiftedUniform, TimeDistribution
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks
from crcm_jax.training.objectives._bidirectional_diffusion import (
  time_weight,
  Weighting,
)

DEFAULT_TIME = ShiftedUniform(5.0)


class DiffusionForcingDraws(NamedTuple):
  """One time a chunk, noise, and whose caption is dropped."""

  t: Float[Array, "b chunks"]
  noise: Float[Array, "b f h w c"]
  drop: Bool[Array, "b"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionForcing:
  """Flow matching of a causal network with one time per chunk.

  Attributes:
    student: the network.
    pattern: how frames form chunks.
    time: law of the training times.
    chunk_times: how the chunks of a video share it: "random" draws one time
      for each, "same" one for all, "monotone" one for each that never falls
      from chunk to chunk.
    weighting: weight of a time.
    caption_dropout: share of examples that are trained without caption.
    loss_scale: factor of the loss.
  """

  student: Any
  pattern: ChunkPattern
  time: TimeDistribution = DEFAULT_TIME
  chunk_times: Literal["random", "same", "monotone"] = "random"
  weighting: Weighting = "none"
  caption_dropout: float = 0.1
  loss_scale: float = 100.0

  def __post_init__(self):
    if self.chunk_times not in ("random", "same", "monotone"):
      raise ValueError(
        '`chunk_times` must be "random", "same" or "monotone"; got '
        f"{self.chunk_times!r}."
      )

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> DiffusionForcingDraws:
    """Draws the chunks' times, noise and dropped captions."""
    del counters
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    size, frames = batch.x_0.shape[:2]
    chunks = self.pattern.num_chunks(frames)
    if self.chunk_times == "monotone":
      t = time_sampling.monotone(time_key, self.time, size, chunks)
    else:
      times = chunks if self.chunk_times == "random" else 1
      t = self.time.sample(time_key, (size, times))
      t = t.repeat(chunks // times, axis=1)
    return DiffusionForcingDraws(
      t=t,
      noise=_inputs.noise_like(noise_key, batch.x_0),
      drop=jax.random.bernoulli(drop_key, self.caption_dropout, (size,)),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: DiffusionForcingDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.FlowMatchingMetrics]:
    """Returns the flow-matching loss of each example."""
    del frozen, counters
    inputs = _inputs.prepare(batch, draws.drop)
    t = draws.t[:, self.pattern.chunk_of_frame(inputs.x_0.shape[1])]
    loss, metrics = losses.flow_matching_loss(
      _networks.block_causal(self.student, inputs.condition, self.pattern),
      trainable,
      inputs.x_0,
      draws.noise,
      t,
      weight=time_weight(self.weighting, t),
    )
    return self.loss_scale * loss, metrics
