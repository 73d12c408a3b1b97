"""Initialises a few-step student by regression onto its teacher's ODE.

The teacher's ODE is followed from noise to its end x_0, and the student's data
prediction fitted to that end from where the trajectory was at one of the
student's own times, drawn for each chunk:

    loss = || x_t - t v(x_t, t) - x_0 ||^2

The trajectories are made anew at every step, of the parameters and captions at
hand: no pair is stored, and none is seen twice.

References:
  Yin et al., CausVid, arXiv 2412.07772.
  Huang et al., Self Forcing, arXiv 2506.08009.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import losses, sampling
from crcm_jax._typing import (
  Array,
  Float,
  Int,
  ParametricVelocity,
  Params,
  PRNGKeyArray,
  Velocity,
)
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks


class OdeRegressionDraws(NamedTuple):
  """Which of its times each chunk gets, noise, and noise of the context."""

  u: Float[Array, "b chunks"]
  noise: Float[Array, "b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Regression:
  """What both regressions share.

  Attributes:
    student: the network to train.
    pattern: how frames form chunks.
    mid_times: for each chunk, the student's times between the first and 0; the
      last one serves all further chunks.
    ode_steps: steps of the teacher's ODE.
    ode_shift: shift of its times.
    guidance: scale of the teacher's classifier-free guidance.
    loss_scale: factor of the loss.
  """

  student: Any
  pattern: ChunkPattern
  mid_times: tuple[tuple[float, ...], ...] = ((15 / 16, 5 / 6, 5 / 8),)
  ode_steps: int = 50
  ode_shift: float = 3.0
  guidance: float = 3.0
  loss_scale: float = 1.0

  def __post_init__(self):
    self._times()  # Refuses what makes no sense.

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> OdeRegressionDraws:
    """Draws each chunk's place on the trajectory, and noises."""
    del counters
    u_key, noise_key, context_key = jax.random.split(key, 3)
    x_0 = batch.x_0
    chunks = self.pattern.num_chunks(x_0.shape[1])
    return OdeRegressionDraws(
      u=jax.random.uniform(u_key, (x_0.shape[0], chunks)),
      noise=_inputs.noise_like(noise_key, x_0),
      context_noise=self._context_noise(context_key, x_0),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: OdeRegressionDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.RegressionMetrics]:
    """Returns the regression loss of each example."""
    del counters
    inputs = _inputs.prepare(batch)
    teacher = self._teacher(frozen, inputs)
    pairs = sampling.ode_pairs(
      lambda x, t: teacher(x, _inputs.per_frame(t, x)),
      draws.noise,
      self._times(),
      steps=self.ode_steps,
      shift=self.ode_shift,
    )
    place = self._places(draws.u, inputs.x_0.shape[1])
    which = jnp.broadcast_to(place[..., None, None, None], inputs.x_0.shape)
    x_t = jax.lax.select_n(which, *pairs.x_t)  # a gather would move examples
    loss, metrics = losses.regression_loss(
      self._student(inputs, draws),
      trainable,
      x_t,
      jnp.where(jnp.isnan(inputs.x_0), jnp.nan, pairs.x_0),  # bad data
      pairs.t[place],
    )
    return self.loss_scale * loss, metrics

  def _context_noise(self, key: PRNGKeyArray, x_0: Array) -> Array | None:
    del key, x_0

  def _teacher(
    self, frozen: dict[str, Params], inputs: _inputs.Inputs
  ) -> Velocity:
    raise NotImplementedError

  def _student(
    self, inputs: _inputs.Inputs, draws: OdeRegressionDraws
  ) -> ParametricVelocity:
    raise NotImplementedError

  def _times(self) -> np.ndarray:
    """Returns the first time, all chunks' times between, and 0."""
    mid_times = {t for times in self.mid_times for t in times}
    return sampling.few_step_schedule(sorted(mid_times, reverse=True))

  def _places(
    self, u: Float[Array, "b chunks"], frames: int
  ) -> Int[Array, "b f"]:
    """Returns which of all times each frame gets: one of its chunk's own."""
    index = self._times().tolist().index
    own = [[0, *map(index, times)] for times in self.mid_times]
    most = max(map(len, own))
    table = jnp.asarray([row + [0] * (most - len(row)) for row in own])
    counts = jnp.asarray([len(row) for row in own])
    chunk = self.pattern.chunk_of_frame(frames)
    row = np.minimum(chunk, len(own) - 1)  # the last one serves all further
    drawn = (u[:, chunk] * counts[row]).astype(jnp.int32)
    return table[row, drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OdeRegression(_Regression):
  """Regression onto the causal teacher's ODE, given the true past.

  The student sees the true past too, as in teacher forcing.

  Attributes:
    teacher: the causal teacher's network; `frozen["teacher"]` its parameters.
    context_times: times of the student's context, as for `TeacherForcing`.
  """

  teacher: Any
  context_times: tuple[float, ...] = (0.0,)

  def _context_noise(self, key, x_0):
    return _inputs.context_noise(key, x_0, self.context_times)

  def _teacher(self, frozen, inputs):
    return _networks.causal_teacher(
      self.teacher, frozen["teacher"], inputs, self.pattern, self.guidance
    )

  def _student(self, inputs, draws):
    context = _inputs.noisy_history(
      inputs.history, draws.context_noise, self.context_times, self.pattern
    )
    return _networks.teacher_forcing(
      self.student, inputs.condition, self.pattern, *context
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalOdeRegression(_Regression):
  """Regression onto a bidirectional teacher's ODE of the whole video.

  The student sees the past as noisy as its trajectory is there, as in
  diffusion forcing: the initialisation of CausVid. Of the data it takes the
  captions alone.

  Attributes:
    real: the bidirectional teacher; `frozen["real"]` its parameters.
  """

  real: Any

  def _teacher(self, frozen, inputs):
    return _networks.bidirectional_teacher(
      self.real, frozen["real"], inputs, self.guidance
    )

  def _student(self, inputs, draws):
    del draws
    return _networks.block_causal(self.student, inputs.condition, self.pattern)
