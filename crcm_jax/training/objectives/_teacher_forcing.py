"""Diffusion training of the causal teacher, on clean history.

Each noisy chunk is denoised given the clean chunks before it, all chunks of a
video at once and at one time t:

    loss = w(t) || v(x_t, t; context = x_0) - (noise - x_0) ||^2

References:
  Causal-rCM, arXiv 2606.25473, equations (8) and (9).
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from crcm_jax import losses
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


class TeacherForcingDraws(NamedTuple):
  """One time a video, noise, noise of the context, and dropped captions."""

  t: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None
  drop: Bool[Array, "b"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherForcing:
  """Flow matching of a causal network given the true past.

  Attributes:
    student: the network.
    pattern: how frames form chunks.
    time: law of the training times.
    weighting: weight of a time.
    context_times: times of the context's chunks, 0 for clean; the last one
      serves all further chunks.
    caption_dropout: share of examples that are trained without caption.
    loss_scale: factor of the loss.
  """

  student: Any
  pattern: ChunkPattern
  time: TimeDistribution = DEFAULT_TIME
  weighting: Weighting = "gaussian_bell"
  context_times: tuple[float, ...] = (0.0,)
  caption_dropout: float = 0.1
  loss_scale: float = 100.0

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> TeacherForcingDraws:
    """Draws times, noises and dropped captions."""
    del counters
    time_key, noise_key, context_key, drop_key = jax.random.split(key, 4)
    x_0, size = batch.x_0, batch.x_0.shape[0]
    return TeacherForcingDraws(
      t=self.time.sample(time_key, (size,)),
      noise=_inputs.noise_like(noise_key, x_0),
      context_noise=_inputs.context_noise(context_key, x_0, self.context_times),
      drop=jax.random.bernoulli(drop_key, self.caption_dropout, (size,)),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: TeacherForcingDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.FlowMatchingMetrics]:
    """Returns the flow-matching loss of each example."""
    del frozen, counters
    inputs = _inputs.prepare(batch, draws.drop)
    context = _inputs.noisy_history(
      inputs.history, draws.context_noise, self.context_times, self.pattern
    )
    t = _inputs.per_frame(draws.t, inputs.x_0)
    loss, metrics = losses.flow_matching_loss(
      _networks.teacher_forcing(
        self.student, inputs.condition, self.pattern, *context
      ),
      trainable,
      inputs.x_0,
      draws.noise,
      t,
      weight=time_weight(self.weighting, t),
    )
    return self.loss_scale * loss, metrics
