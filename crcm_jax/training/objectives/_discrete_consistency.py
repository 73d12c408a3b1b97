"""Distils a causal teacher by consistency at neighbouring times (TF-dCM).

With times t_0 > ... > t_N a few steps of a shifted uniform grid apart,

    P = f(x_{t_0}, t_0; context),   x_{t_{k+1}} by guided teacher Euler steps,
    Q = f(x_{t_N}, t_N; context'),  loss = (P - stop_gradient(Q))^2

where f is the student's data prediction. The teacher always sees the clean
past; a student with a noisy cache sees a noisy one, drawn twice.

References:
  Causal-rCM, arXiv 2606.25473, equations (1) and (10).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import losses, paths
from crcm_jax._typing import Array, Float, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks


class DiscreteConsistencyDraws(NamedTuple):
  """Where on the grid, noise, and noise of the two contexts."""

  u: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None
  target_context_noise: Float[Array, "b f h w c"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteConsistency:
  """Discrete-time consistency of a causal student with its teacher.

  Attributes:
    student: the network to train.
    teacher: the causal teacher's network; `frozen["teacher"]` its parameters.
    pattern: how frames form chunks.
    guidance: scale of the teacher's classifier-free guidance.
    total_steps: steps of the teacher's grid from 1 to 0.
    skip: teacher steps between the student's two times.
    shift: shift of the grid towards noise.
    context_times: times of the student's context, as for `TeacherForcing`.
    loss_scale: factor of the loss.
  """

  student: Any
  teacher: Any
  pattern: ChunkPattern
  guidance: float = 3.0
  total_steps: int = 48
  skip: int = 1
  shift: float = 3.0
  context_times: tuple[float, ...] = (0.0,)
  loss_scale: float = 100.0

  def __post_init__(self):
    if not 1 <= self.skip < self.total_steps:
      raise ValueError(
        "`skip` must lie between 1 and `total_steps` - 1 = "
        f"{self.total_steps - 1}; got {self.skip}."
      )

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> DiscreteConsistencyDraws:
    """Draws places on the grid, and noises."""
    del counters
    u_key, noise_key, student_key, target_key = jax.random.split(key, 4)
    x_0, times = batch.x_0, self.context_times
    return DiscreteConsistencyDraws(
      u=jax.random.uniform(u_key, (x_0.shape[0],)),
      noise=_inputs.noise_like(noise_key, x_0),
      context_noise=_inputs.context_noise(student_key, x_0, times),
      target_context_noise=_inputs.context_noise(target_key, x_0, times),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: DiscreteConsistencyDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.DiscreteConsistencyMetrics]:
    """Returns the consistency loss of each example."""
    del counters
    inputs = _inputs.prepare(batch)
    teacher = _networks.causal_teacher(
      self.teacher, frozen["teacher"], inputs, self.pattern, self.guidance
    )
    loss, metrics = losses.discrete_consistency_loss(
      self._student(inputs, draws.context_noise),
      trainable,
      teacher,
      inputs.x_0,
      draws.noise,
      self._times(draws.u, inputs.x_0),
      target=functools.partial(
        self._student(inputs, draws.target_context_noise),
        jax.lax.stop_gradient(trainable),
      ),
    )
    return self.loss_scale * loss, metrics

  def _student(self, inputs: _inputs.Inputs, context_noise: Array | None):
    context = _inputs.noisy_history(
      inputs.history, context_noise, self.context_times, self.pattern
    )
    return _networks.teacher_forcing(
      self.student, inputs.condition, self.pattern, *context
    )

  def _times(self, u: Float[Array, "b"], x: Array) -> Array:
    """Returns t_0 > ... > t_N for each frame, `[b, f, N + 1]`."""
    du = 1 / self.total_steps
    k = jnp.arange(self.skip + 1, dtype=u.dtype)
    s = 1 - (u[:, None] * (1 - self.skip * du) + k * du)
    t = paths.shift_time(s, self.shift)
    return jnp.repeat(t[:, None], x.shape[1], axis=1)
