"""From parameters to clips: how each kind of network is sampled.

Few steps or many, a causal network has one compiled program: its schedule is
an argument of it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import guidance, models, sampling
from crcm_jax._typing import Array, Float, Int, Params, PRNGKeyArray, Velocity
from crcm_jax.chunks import ChunkPattern
from crcm_jax.data import Batch


@runtime_checkable
class Generator(Protocol):
  """Makes one clip for each example of a batch."""

  def __call__(
    self,
    params: Params,
    key: PRNGKeyArray,
    batch: Batch,
    steps: int | None = None,
  ) -> Float[Array, "b f h w c"]:
    """Returns latents.

    Args:
      params: the network's parameters.
      key: of the noise.
      batch: gives the conditions, and in `x_0` the shape.
      steps: how many steps a chunk; None for the most, or the usual.

    Raises:
      ValueError: if the network has no schedule of so many steps.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the networks of an experiment are sampled; kept in its checkpoints.

  Attributes:
    mid_times: for each number of steps, as text, the times between the first
      and 0 of each chunk; the last chunk's serve all further ones. The most
      steps are those that self-forcing trains.
    solver: how a few-step student goes from one time to the next; see
      `sampling.rollout`. "mean_flow" needs a network with `end_time`.
    context: what is committed of a finished chunk; see `sampling.rollout`.
    context_start: first chunk for which `context` holds.
    ode_steps: usual, and most, steps of a diffusion model's ODE sampler.
    ode_shift: shift of its times.
    guidance: its guidance scale.
  """

  mid_times: Mapping[str, Sequence[Sequence[float]]] = dataclasses.field(
    default_factory=lambda: {
      name: (sampling.MID_TIMES[name],) for name in ("4", "2", "1")
    }
  )
  solver: Literal["consistency", "mean_flow"] = "consistency"
  context: Literal["clean", "last_step"] = "clean"
  context_start: int = 0
  ode_steps: int = 50
  ode_shift: float = 3.0
  guidance: float = 3.0

  @property
  def few_steps(self) -> tuple[int, ...]:
    """The numbers of steps that a student has a schedule for, most first."""
    return tuple(sorted(map(int, self.mid_times), reverse=True))

  @property
  def most_steps(self) -> int:
    """The most steps that a student has a schedule for."""
    return self.few_steps[0]

  @property
  def context_times(self) -> tuple[float, ...]:
    """How noisy each chunk is that a chunk sees: 0 where it is clean.

    With the context "last_step" it is the last time of the full schedule, and
    1 for a chunk of a single step. The last entry serves all further chunks.
    """
    if self.context == "clean":
      return (0.0,)
    mid_times = self.mid_times[str(self.most_steps)]
    last = [(times or (1.0,))[-1] for times in mid_times]
    chunks = max(len(last), self.context_start + 1)
    last += last[-1:] * (chunks - len(last))
    clean = [0.0] * self.context_start
    return (*clean, *last[self.context_start :])

  def few_step(self, model: models.Wan, pattern: ChunkPattern) -> Generator:
    """Returns the streaming sampler of a distilled student."""
    program = jax.jit(functools.partial(_few_step, self, model, pattern))

    def generate(params, key, batch, steps=None):
      times = [
        sampling.few_step_schedule(mid_times)
        for mid_times in self._mid_times(steps or self.most_steps)
      ]
      schedule = _schedule(times, pattern, batch, self.most_steps)
      return program(params, key, batch, schedule)

    return generate

  def ode(self, model: models.Wan, pattern: ChunkPattern | None) -> Generator:
    """Returns the guided ODE sampler of a diffusion model.

    Args:
      model: the network.
      pattern: its chunks; None if it is bidirectional.
    """
    if pattern is None:
      return self._ode_bidirectional(model)
    program = jax.jit(functools.partial(_ode_causal, self, model, pattern))

    def generate(params, key, batch, steps=None):
      times = self._ode_times(steps)
      most = max(self.ode_steps, len(times) - 1)
      schedule = _schedule([times], pattern, batch, most)
      return program(params, key, batch, schedule)

    return generate

  def _ode_bidirectional(self, model: models.Wan) -> Generator:
    program = jax.jit(
      functools.partial(_ode_bidirectional, self, model),
      static_argnames="times",
    )

    def generate(params, key, batch, steps=None):
      times = tuple(map(float, self._ode_times(steps)))
      return program(params, key, batch, times=times)

    return generate

  def _ode_times(self, steps: int | None) -> np.ndarray:
    return sampling.ode_schedule(steps or self.ode_steps, shift=self.ode_shift)

  def _mid_times(self, steps: int) -> Sequence[Sequence[float]]:
    if str(steps) not in self.mid_times:
      raise ValueError(
        f"`steps` must be one of {self.few_steps}, for which this model has a"
        f" schedule; got {steps}."
      )
    return self.mid_times[str(steps)]


_FIRST_TIME = float(sampling.few_step_schedule(())[0])
"""The time at which all samplers start: finite noise, not pure noise."""

_Schedule = tuple[Float[Array, "chunks grid"], Int[Array, "chunks"]]


def _schedule(
  schedules: Sequence[Any], pattern: ChunkPattern, batch: Batch, most: int
) -> _Schedule:
  """Lays out the chunks' schedules, padded to `most` steps."""
  chunks = pattern.num_chunks(batch.x_0.shape[1])
  rows = [tuple(map(float, times)) for times in schedules]
  grid, counts = sampling.chunk_times(rows, chunks)
  return jnp.pad(grid, ((0, 0), (0, most + 1 - grid.shape[1]))), counts


def _few_step(
  settings: Sampling,
  model: models.Wan,
  pattern: ChunkPattern,
  params: Params,
  key: PRNGKeyArray,
  batch: Batch,
  schedule: _Schedule,
) -> Float[Array, "b f h w c"]:
  steps = schedule[0].shape[1] - 1
  made = sampling.rollout(
    _chunks(model, batch, batch.condition),
    params,
    jax.random.normal(key, (steps, *batch.x_0.shape)),
    pattern,
    *schedule,
    solver=settings.solver,
    context=settings.context,
    context_start=settings.context_start,
    initial_scale=_FIRST_TIME,
    differentiable=False,
  )
  return made.video


def _ode_causal(
  settings: Sampling,
  model: models.Wan,
  pattern: ChunkPattern,
  params: Params,
  key: PRNGKeyArray,
  batch: Batch,
  schedule: _Schedule,
) -> Float[Array, "b f h w c"]:
  made = sampling.rollout(
    sampling.guided(
      _chunks(model, batch, batch.condition),
      _chunks(model, batch, batch.null_condition),
      settings.guidance,
    ),
    params,
    jax.random.normal(key, (1, *batch.x_0.shape)),
    pattern,
    *schedule,
    solver="euler",
    initial_scale=_FIRST_TIME,
    differentiable=False,
  )
  return made.video


def _ode_bidirectional(
  settings: Sampling,
  model: models.Wan,
  params: Params,
  key: PRNGKeyArray,
  batch: Batch,
  *,
  times: tuple[float, ...],
) -> Float[Array, "b f h w c"]:
  frames = batch.x_0.shape[1]

  def under(condition: Any) -> Velocity:
    def velocity(x: Array, t: Array) -> Any:
      t = jnp.repeat(t[:, None], frames, axis=1)
      return model.apply({"params": params}, x, t, condition)

    return velocity

  velocity = guidance.classifier_free(
    under(batch.condition), under(batch.null_condition), settings.guidance
  )
  noise = jax.random.normal(key, batch.x_0.shape)
  return sampling.integrate(velocity, times[0] * noise, np.asarray(times))


def _chunks(
  model: models.Wan, batch: Batch, condition: Any
) -> models.WanChunks:
  _, _, height, width, _ = batch.x_0.shape
  return models.WanChunks(model, condition, height=height, width=width)
