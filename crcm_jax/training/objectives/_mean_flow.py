"""Distils a causal teacher into mean velocities between any two times.

The student's velocity u(x, t, s) is the mean one of the guided teacher's ODE
from t to s, chunk by chunk given the clean past, so that it jumps from any time
to any earlier one, x_s = x_t - (t - s) u. At s = 0 it is a consistency model.

    g = -(u - v_T) - r (t - s) JVP(u; (x_t, t, s), (v_T, 1, 0)),
    loss = || u - sg(u) - g / (||g|| + c) ||^2

References:
  Causal-rCM, arXiv 2606.25473, equations (3) and (4).
  Geng et al., Mean Flows, arXiv 2505.13447.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import losses
from crcm_jax._typing import Array, Float, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.time_sampling import LogNormal, TimeDistribution
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks

DEFAULT_TIME = LogNormal(-0.8, 1.6)


class MeanFlowDraws(NamedTuple):
  """Two times a video, noise, and noise of the student's context."""

  t: Float[Array, "b"]
  end_time: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanFlow:
  """Mean velocities of a causal student, from the ODE of its teacher.

  The two times of a video are draws of one law, the later one t. In a share of
  the videos the end is t itself, where u is the teacher's velocity, and in
  another it is 0, where every sampler ends and the two draws never do.

  Attributes:
    student: the network to train, of `WanConfig(end_time=True)`.
    teacher: the causal teacher's network; `frozen["teacher"]` its parameters.
    pattern: how frames form chunks.
    guidance: scale of the teacher's classifier-free guidance.
    time: law of the two times.
    same_share: share of videos whose end time is t.
    data_share: share of videos whose end time is 0.
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
  same_share: float = 0.25
  data_share: float = 0.25
  tangent_warmup: int = 1000
  normaliser_eps: float = 0.1
  tangent_pass: losses.TangentPass = "shared"
  tangent_step: float = losses.TANGENT_STEP
  context_times: tuple[float, ...] = (0.0,)
  loss_scale: float = 100.0

  def __post_init__(self):
    shares = self.same_share, self.data_share
    if min(shares) < 0 or sum(shares) > 1:
      raise ValueError(
        "`same_share` and `data_share` must not be negative and add up to at"
        f" most 1; got {shares}."
      )

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> MeanFlowDraws:
    """Draws both times, and noises."""
    del counters
    time_key, kind_key, noise_key, context_key = jax.random.split(key, 4)
    x_0 = batch.x_0
    size = x_0.shape[0]
    times = self.time.sample(time_key, (2, size))
    t, end_time = times.max(axis=0), times.min(axis=0)
    kind = jax.random.uniform(kind_key, (size,))
    end_time = jnp.where(kind < self.same_share, t, end_time)
    end_time = jnp.where(kind >= 1 - self.data_share, 0, end_time)
    return MeanFlowDraws(
      t=t,
      end_time=end_time,
      noise=_inputs.noise_like(noise_key, x_0),
      context_noise=_inputs.context_noise(context_key, x_0, self.context_times),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: MeanFlowDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.ContinuousConsistencyMetrics]:
    """Returns the MeanFlow loss of each example."""
    inputs = _inputs.prepare(batch)
    context = _inputs.noisy_history(
      inputs.history, draws.context_noise, self.context_times, self.pattern
    )
    t = _inputs.per_frame(draws.t, inputs.x_0)
    loss, metrics = losses.mean_flow_loss(
      _networks.mean_velocity(
        self.student, inputs.condition, self.pattern, *context
      ),
      trainable,
      _networks.causal_teacher(
        self.teacher, frozen["teacher"], inputs, self.pattern, self.guidance
      ),
      inputs.x_0,
      draws.noise,
      t,
      _inputs.per_frame(draws.end_time, inputs.x_0),
      tangent_weight=_inputs.warmed_up(self.tangent_warmup, counters, t),
      normaliser_eps=self.normaliser_eps,
      tangent_pass=self.tangent_pass,
      tangent_step=self.tangent_step,
    )
    return self.loss_scale * loss, metrics
