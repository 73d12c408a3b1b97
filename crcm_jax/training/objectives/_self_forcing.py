"""Trains a streaming student on its own videos (self-forcing DMD).

A student phase rolls the student out, asks the real and the fake score where
its video should go, and moves the last denoising step of each chunk there:

    video = rollout(student),    target = video - (f - r) / mean |video - r|
    loss = || x_0(student) - target ||^2

A critic phase trains the fake score on such videos. The rollout's history is
constant for the gradient, so all chunks can be replayed in one pass.

References:
  Causal-rCM, arXiv 2606.25473, equations (7), (11) to (14).
  Huang et al., Self Forcing, arXiv 2506.08009.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import losses, models, paths, sampling
from crcm_jax._typing import Array, Float, Int, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.kernels._compat import target_platform
from crcm_jax.sampling import Rollout
from crcm_jax.time_sampling import ShiftedUniform, TimeDistribution
from crcm_jax.training._counters import Counters, step_counts
from crcm_jax.training.objectives import _inputs, _networks
from crcm_jax.training.objectives._objective import Masked

DEFAULT_TIME = ShiftedUniform(5.0)

TIME_BUCKETS = 4
"""Intervals of t in which the critic's error is measured apart."""


class SelfForcingDraws(NamedTuple):
  """Noise of a rollout, and time and noise at which its video is scored."""

  step_noise: Float[Array, "steps b f h w c"]
  context_noise: Float[Array, "b f h w c"] | None
  t: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]


class CriticMetrics(NamedTuple):
  """What the critic's regression measures.

  Attributes:
    error: mean squared error of its velocity, per example.
    error_by_time: the same in each of `TIME_BUCKETS` equal intervals of t: a
      critic that lags behind the student shows where t is large.
    dropped: 1 where bad data removed the example.
    student_non_finite: 1 where the critic itself gave NaN or infinity.
  """

  error: Float[Array, "b"]
  error_by_time: Masked
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


class SelfForcingMetrics(NamedTuple):
  """What self-forcing measures.

  Attributes:
    gradient_norm: norm of the normalised score difference, per example.
    scale: mean distance of the samples from the real score's prediction.
    chunk_gradient_norm: that of each chunk alone, their squares adding up: a
      chunk that drifts apart shows here first.
    steps: denoising steps of this iteration's first chunk.
    dropped: 1 where a caption or a score removed the example.
    student_non_finite: 1 where the student's own video is not finite.
  """

  gradient_norm: Float[Array, "b"]
  scale: Float[Array, "b"]
  chunk_gradient_norm: Float[Array, "b chunks"]
  steps: Float[Array, ""]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Simulation:
  """How the student's own videos are made; both phases share it.

  Attributes:
    student: the network that is rolled out.
    pattern: how frames form chunks.
    mid_times: for each chunk, the times between 1 and 0 of its denoising
      steps; the last one serves all further chunks.
    solver: how a denoising step leads to the next; see `sampling.rollout`.
    context: what the cache keeps of a finished chunk; likewise.
    context_start: with "last_step", the first chunk that is kept noisy.
    time: law of the times at which videos are scored.
    loss_scale: factor of the loss.
    unroll: whether on GPUs a rollout does not scan the layers, which follow
      one another in its program (`models.unstack_layers`): its passes are
      shorter, for a minute more of compiling.
  """

  student: Any
  pattern: ChunkPattern
  mid_times: tuple[tuple[float, ...], ...] = ((15 / 16, 5 / 6, 5 / 8),)
  solver: Literal["consistency", "mean_flow"] = "consistency"
  context: Literal["clean", "last_step"] = "clean"
  context_start: int = 0
  time: TimeDistribution = DEFAULT_TIME
  loss_scale: float = 1.0
  unroll: bool = True

  def __post_init__(self):
    sampling.chunk_times(self._schedules(), 1)  # Refuses what makes no sense.

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> SelfForcingDraws:
    """Draws the rollout's noises, and time and noise of the scores."""
    del counters
    steps_key, context_key, time_key, noise_key = jax.random.split(key, 4)
    x_0 = batch.x_0
    noisy = self.context == "last_step"
    return SelfForcingDraws(
      step_noise=_inputs.noise_like(
        steps_key, x_0, len(self._schedules()[0]) - 1
      ),
      context_noise=_inputs.noise_like(context_key, x_0) if noisy else None,
      t=self.time.sample(time_key, (x_0.shape[0],)),
      noise=_inputs.noise_like(noise_key, x_0),
    )

  def _schedules(self) -> list[tuple[float, ...]]:
    """Training starts from pure noise, t = 1."""
    return [(1.0, *mid_times, 0.0) for mid_times in self.mid_times]

  def _chunks(self, condition: Any, x: Array) -> sampling.ChunkModel:
    height, width = x.shape[2:4]
    return models.WanChunks(self.student, condition, height=height, width=width)

  def _roll_out(
    self,
    params: Params,
    inputs: _inputs.Inputs,
    draws: SelfForcingDraws,
    counter: Int[Array, ""],
    *,
    differentiable: bool,
  ) -> tuple[Rollout, Int[Array, "chunks"]]:
    """Returns the student's video, and the steps each chunk took."""
    chunks = self.pattern.num_chunks(inputs.x_0.shape[1])
    times, full_counts = sampling.chunk_times(self._schedules(), chunks)
    counts = step_counts(counter, full_counts)
    if not differentiable:
      params = self._for_short_passes(params)
    made = sampling.rollout(
      self._chunks(inputs.condition, inputs.x_0),
      params,
      draws.step_noise,
      self.pattern,
      times,
      counts,
      solver=self.solver,
      context=self.context,
      context_start=self.context_start,
      context_noise=draws.context_noise,
      differentiable=differentiable,
    )
    return made, counts

  def _for_short_passes(self, params: Params) -> Params:
    """Returns a copy of the student that about a hundred passes read fast."""
    if self.unroll and target_platform() == "gpu":
      params = models.unstack_layers(params)
    params = models.working_copy(params, self.student.config.dtype)
    place = self.student.place
    return params if place is None else place("network", params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfForcing(_Simulation):
  """Distribution matching of the student's own videos: the student's phase.

  Attributes:
    real: the bidirectional teacher; `frozen["real"]` its parameters.
    fake: the critic's network; `frozen["fake"]` its parameters.
    guidance: scale of the real score's classifier-free guidance.
    replay: how the gradient is computed, the same whichever: "parallel" in
      one teacher-forcing pass over all chunks, "chunks" one chunk at a time
      in the memory of one, "direct" through the rollout itself.
  """

  real: Any
  fake: Any
  guidance: float = 5.0
  replay: Literal["parallel", "chunks", "direct"] = "parallel"

  def __post_init__(self):
    super().__post_init__()
    if self.replay not in ("parallel", "chunks", "direct"):
      raise ValueError(
        '`replay` must be "parallel", "chunks" or "direct"; got '
        f"{self.replay!r}."
      )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: SelfForcingDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], SelfForcingMetrics]:
    """Returns the distribution-matching loss of each example."""
    inputs = _inputs.prepare(batch)
    made, counts = self._roll_out(
      trainable,
      inputs,
      draws,
      counters.student,
      differentiable=self.replay == "direct",
    )
    target, metrics = losses.distribution_matching_target(
      made.video,
      _mark(draws.noise, inputs),
      _inputs.per_frame(draws.t, made.video),
      self._real(frozen, inputs),
      self._fake(frozen, inputs),
    )
    video = self._replayed(trainable, inputs, made)
    loss = losses.target_matching_loss(video, target)
    return self.loss_scale * loss, SelfForcingMetrics(
      chunk_gradient_norm=_chunk_norms(
        losses.zero_examples(made.video - target, metrics.dropped == 0),
        self.pattern,
      ),
      steps=counts[0].astype(loss.dtype),
      **metrics._asdict(),
    )

  def _real(self, frozen, inputs):
    return _networks.bidirectional_teacher(
      self.real, frozen["real"], inputs, self.guidance
    )

  def _fake(self, frozen, inputs):
    return functools.partial(
      _networks.bidirectional(self.fake, inputs.condition),
      jax.lax.stop_gradient(frozen["fake"]),
    )

  def _replayed(self, params, inputs, made: Rollout) -> Array:
    """Returns the rollout's video, differentiable in its last steps."""
    if self.replay == "direct":
      return made.video
    if self.replay == "chunks":
      chunks = self._chunks(inputs.condition, inputs.x_0)
      return sampling.replay(chunks, params, made, self.pattern)
    v = self.student.apply(
      {"params": params},
      made.last_input,
      made.last_t,
      inputs.condition,
      pattern=self.pattern,
      context=made.context,
      context_t=made.context_t,
      context_gradient=False,
    )
    return paths.data_prediction(made.last_input, v, made.last_t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic(_Simulation):
  """Trains the fake score on the student's own videos: the critic's phase.

  Attributes:
    fake: the critic's network, which is trained; `frozen["student"]` holds
      the parameters of the student.
  """

  fake: Any

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: SelfForcingDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], CriticMetrics]:
    """Returns the critic's flow-matching loss of each example."""
    inputs = _inputs.prepare(batch)
    made, _ = self._roll_out(
      frozen["student"], inputs, draws, counters.critic, differentiable=False
    )
    loss, metrics = losses.critic_loss(
      _networks.bidirectional(self.fake, inputs.condition),
      trainable,
      made.video,
      _mark(draws.noise, inputs),
      _inputs.per_frame(draws.t, made.video),
    )
    by_time = _by_time(metrics.error, draws.t, metrics.dropped == 0)
    return self.loss_scale * loss, CriticMetrics(
      error_by_time=by_time, **metrics._asdict()
    )


def _mark(noise: Array, inputs: _inputs.Inputs) -> Array:
  """Makes losses drop the bad examples, whose data they do not see."""
  return jnp.where(jnp.isnan(inputs.x_0), jnp.nan, noise)


def _chunk_norms(
  x: Float[Array, "b f h w c"], pattern: ChunkPattern
) -> Float[Array, "b chunks"]:
  square = jnp.sum(jnp.square(x), axis=(2, 3, 4))
  spans = pattern.spans(x.shape[1])
  chunks = [square[:, start:stop].sum(axis=1) for start, stop in spans]
  return jax.lax.stop_gradient(jnp.sqrt(jnp.stack(chunks, axis=1)))


def _by_time(
  values: Float[Array, "b"], t: Float[Array, "b"], keep: Array
) -> Masked:
  """Sorts the values of the examples that are kept into buckets of time."""
  bucket = jnp.minimum((t * TIME_BUCKETS).astype(jnp.int32), TIME_BUCKETS - 1)
  inside = (bucket[:, None] == jnp.arange(TIME_BUCKETS)) & keep[:, None]
  here = jnp.where(inside, values[:, None], 0)
  return Masked(jax.lax.stop_gradient(here), jnp.asarray(inside, values.dtype))
