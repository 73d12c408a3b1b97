"""Distils a causal teacher by consistency in continuous time (TF-sCM).

The student's data prediction is made constant along the guided teacher's ODE,
chunk by chunk given the clean past, from the tangent of the student's velocity
at one time t a video:

    g = -(v - v_T) - r t JVP(v; (x_t, t), (v_T, 1)),
    loss = || v - sg(v) - g / (||g|| + c) ||^2

References:
  Causal-rCM, arXiv 2606.25473, equations (15) to (18).
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from crcm_jax import losses
from crcm_jax._typing import Array, Float, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.time_sampling import LogNormal, TimeDistribution
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks

DEFAULT_TIME = LogNormal(-0.8, 1.6)


class ContinuousConsistencyDraws(NamedTuple):
  """One time a video, noise, and noise of the student's context."""

  t: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousConsistency:
  """Continuous-time consistency of a causal student with its teacher.

  Attributes:
    student: the network to train.
    teacher: the causal teacher's network; `frozen["teacher"]` its parameters.
    pattern: how frames form chunks.
    guidance: scale of the teacher's classifier-free guidance.
    time: law of the training times.
    tangent_warmup: iterations over which the tangent's weight r rises from 0
      to 1; 0 for none.
    normaliser_eps: c above.
    tangent_pass: see `losses.continuous_consistency_loss`.
    tangent_step: likewise.
    context_times: times of the student's context, as for `TeacherForcing`.
    loss_scale: factor of the loss.
  """

  student: Any
  teacher: Any
  pattern: ChunkPattern
  guidance: float = 3.0
  time: TimeDistribution = DEFAULT_TIME
  tangent_warmup: int = 1000
  normaliser_eps: float = 0.1
  tangent_pass: losses.TangentPass = "shared"
  tangent_step: float = losses.TANGENT_STEP
  context_times: tuple[float, ...] = (0.0,)
  loss_scale: float = 100.0

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> ContinuousConsistencyDraws:
    """Draws times and noises."""
    del counters
    time_key, noise_key, context_key = jax.random.split(key, 3)
    x_0 = batch.x_0
    return ContinuousConsistencyDraws(
      t=self.time.sample(time_key, (x_0.shape[0],)),
      noise=_inputs.noise_like(noise_key, x_0),
      context_noise=_inputs.context_noise(context_key, x_0, self.context_times),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: ContinuousConsistencyDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.ContinuousConsistencyMetrics]:
    """Returns the consistency loss of each example."""
    inputs = _inputs.prepare(batch)
    context = _inputs.noisy_history(
      inputs.history, draws.context_noise, self.context_times, self.pattern
    )
    teacher = _networks.causal_teacher(
      self.teacher, frozen["teacher"], inputs, self.pattern, self.guidance
    )
    t = _inputs.per_frame(draws.t, inputs.x_0)
    loss, metrics = losses.continuous_consistency_loss(
      _networks.teacher_forcing(
        self.student, inputs.condition, self.pattern, *context
      ),
      trainable,
      teacher,
      inputs.x_0,
      draws.noise,
      t,
      tangent_weight=_inputs.warmed_up(self.tangent_warmup, counters, t),
      normaliser_eps=self.normaliser_eps,
      tangent_pass=self.tangent_pass,
      tangent_step=self.tangent_step,
    )
    return self.loss_scale * loss, metrics
