"""Autoregressive generation, chunk by chunk, with a cache of the past.

Chunk b starts from noise, x = initial_scale * e_0 at time t_0, and takes the
steps of its own schedule t_0 > t_1 > ... > t_n = 0 under the velocity v that
the network gives it, knowing the chunks before b from the cache:

  consistency:  x <- (1 - t_{s+1}) (x - t_s v) + t_{s+1} e_{s+1}
  euler:        x <- x - (t_s - t_{s+1}) v
  mean_flow:    x <- x - (t_s - t_{s+1}) v(x, t_s, t_{s+1})

and either way the last step returns the data prediction x_0 = x - t v. The
chunk is then committed to the cache, clean or as its last step saw it. The
training rollout of self-forcing (t_0 = 1), the few-step sampler
(t_0 = sigma / (1 + sigma) = initial_scale) and the causal teacher's ODE
sampler are this one function.

The number of steps of each chunk is data: one compiled program serves every
schedule, and equal chunks share one body (`lax.scan`), however many they are.

References:
  Causal-rCM, arXiv 2606.25473, equations 11 to 14.
  Huang et al., Self Forcing, arXiv 2506.08009, algorithm 1.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from crcm_jax import paths
from crcm_jax._times import wide_dtype
from crcm_jax._typing import Array, Bool, Float, Int, Params
from crcm_jax.chunks import ChunkPattern
from crcm_jax.sampling._chunk_model import (
  Cache,
  ChunkModel,
  MeanFlowChunkModel,
)
from crcm_jax.sampling._chunk_scan import chunk_sizes, over_chunks
from crcm_jax.sampling._chunk_times import check_grid, Solver


class Rollout(NamedTuple):
  """A generated video, and how its chunks came about.

  Attributes:
    video: the generated frames, after the prefix if there was one.
    last_input: what each chunk's last denoising step was given.
    last_t: at which time; 0 in prefix frames.
    context: what was committed to the cache: each chunk as later ones see it.
    context_t: at which time.
    cache: the model's cache of the whole video.
  """

  video: Float[Array, "b f h w c"]
  last_input: Float[Array, "b f h w c"]
  last_t: Float[Array, "b f"]
  context: Float[Array, "b f h w c"]
  context_t: Float[Array, "b f"]
  cache: Cache


class _Frames(NamedTuple):
  """What one chunk is given of the arrays with a frame axis."""

  noise: Float[Array, "b f steps h w c"]
  context_noise: Float[Array, "b f h w c"] | None


class _Row(NamedTuple):
  """What one chunk is given of the arrays with a chunk axis.

  A prefix is a chunk that takes no steps, hence `truncated`.
  """

  times: Float[Array, "*chunks grid"]
  count: Int[Array, "*chunks"]
  truncated: Bool[Array, "*chunks"]
  noisy: Bool[Array, "*chunks"]
  context_t: Float[Array, "*chunks"]


def rollout(
  model: ChunkModel,
  params: Params,
  step_noise: Float[Array, "steps b f h w c"],
  pattern: ChunkPattern,
  times: Float[Array, "chunks grid"],
  counts: Int[Array, "chunks"],
  *,
  solver: Solver = "consistency",
  context: Literal["clean", "last_step"] = "clean",
  context_start: int = 0,
  context_noise: Float[Array, "b frames h w c"] | None = None,
  context_times: Float[Array, "chunks"] | None = None,
  prefix: Float[Array, "b p h w c"] | None = None,
  initial_scale: float = 1.0,
  differentiable: bool = True,
) -> Rollout:
  """Generates a video chunk by chunk.

  Gradients flow from each chunk of `video` into `params` through the chunk's
  last step alone: its input, its time and its history are constants there,
  and so are all other results. Differentiating keeps a copy of the cache for
  each chunk; `replay` has the same gradients without.

  Args:
    model: the network under its conditioning.
    params: the network's parameters.
    step_noise: standard normal noise of each step, shared by all chunks, each
      of which takes its own frames. Noise 0 is where a chunk starts. One step
      of it suffices for the other solvers than "consistency".
    pattern: how frames form chunks.
    times: each chunk's schedule, padded with zeros: `chunk_times`.
    counts: steps that each chunk takes, at least 1, at run time. A chunk that
      takes fewer than its schedule has ends early, by data prediction.
    solver: how one step leads to the next: "consistency" predicts the data
      and adds noise again, "euler" follows the ODE, "mean_flow" jumps along
      it with a `MeanFlowChunkModel`.
    context: what is committed of a finished chunk: "clean", its result at
      time 0, or "last_step", its last step's input at that step's time (which
      saves a pass where nothing is differentiated).
    context_start: with "last_step", chunks before this one (counted with the
      prefix) are committed clean.
    context_noise: with "last_step", standard normal noise for all frames,
      prefix included. A chunk that took fewer steps than its schedule has, or
      a prefix, is committed as its clean frames under this noise at
      `context_times`. None promises that there is no such chunk.
    context_times: those times; by default the last nonzero time of each
      chunk's schedule (a prefix uses the first generated chunk's).
    prefix: given clean frames before the generated ones (an image to animate,
      a video to continue): whole chunks.
    initial_scale: factor of the starting noise. 1 in training; the first time
      of the schedule when sampling from finite noise.
    differentiable: False stops all gradients.

  Returns:
    The video and its making, with the prefix in front.

  Raises:
    ValueError: if frames do not fit the pattern, if `times` or `counts` do
      not fit chunks and steps or do not decrease, if a noise or a time of the
      context is missing, or if the model has not what the solver needs.

  Example:
    >>> from crcm_jax.sampling import chunk_times
    >>> class Still:  # Knows no past; every video is zero: v = x / t.
    ...   def init(self, params, batch, frames):
    ...     return ()
    ...   def velocity(self, params, x, t, cache):
    ...     return x / t[..., None, None, None]
    ...   def append(self, params, x, t, cache):
    ...     return x, cache
    ...   def rewind(self, params, cache, frames):
    ...     return cache
    >>> noise = jax.random.normal(jax.random.key(0), (2, 1, 6, 4, 4, 3))
    >>> times, counts = chunk_times([(1.0, 0.5, 0.0)], 2)
    >>> result = rollout(Still(), {}, noise, ChunkPattern(3, 3), times, counts,
    ...                  differentiable=False)
    >>> result.video.shape, float(abs(result.video).max())
    ((1, 6, 4, 4, 3), 0.0)
  """
  dtype = wide_dtype(step_noise.dtype)
  step_noise, context_noise, prefix = jax.tree.map(
    lambda a: a.astype(dtype), (step_noise, context_noise, prefix)
  )
  given = 0 if prefix is None else prefix.shape[1]
  sizes, skip = chunk_sizes(pattern, given, step_noise.shape[2])
  _check_solver(solver, model)
  check_grid(step_noise, times, counts, len(sizes) - skip, solver)
  _check_context(context, context_start, context_noise, skip, sum(sizes))
  _check_context_times(context_times, len(sizes) - skip)
  noisy = (context == "last_step") & (np.arange(len(sizes)) >= context_start)
  rows = _rows(times.astype(dtype), counts, context_times, noisy[skip:])
  generator = _Generator(
    model=model,
    params=params if differentiable else lax.stop_gradient(params),
    solver=solver,
    initial_scale=initial_scale,
    commit_input=context == "last_step" and not differentiable,
  )
  cache = model.init(generator.params, step_noise.shape[1], sum(sizes))
  parts = []
  if prefix is not None:
    frames = (prefix, jax.tree.map(lambda a: a[:, :given], context_noise))
    cache, part = over_chunks(
      generator.commit_prefix,
      cache,
      sizes[:skip],
      frames,
      _prefix_rows(rows, noisy[:skip]),
    )
    parts.append(part)
  frames = _Frames(
    noise=jnp.moveaxis(step_noise, 0, 2),
    context_noise=jax.tree.map(lambda a: a[:, given:], context_noise),
  )
  cache, part = over_chunks(
    generator.generate, cache, sizes[skip:], frames, rows
  )
  parts.append(part)
  joined = (jnp.concatenate(arrays, 1) for arrays in zip(*parts, strict=True))
  return Rollout(*joined, cache=lax.stop_gradient(cache))


def replay(
  model: ChunkModel,
  params: Params,
  made: Rollout,
  pattern: ChunkPattern,
) -> Float[Array, "b f h w c"]:
  """Repeats each chunk's last step, with gradients, one chunk at a time.

  Equals `made.video`, in value and in gradient, at the memory of one chunk's
  activations: the history of every chunk is read from the one finished cache.

  Args:
    model: the network under its conditioning.
    params: its parameters, which receive the gradients.
    made: the rollout, all of it constant here.
    pattern: how frames form chunks.
  """
  made = lax.stop_gradient(made)
  sizes, _ = chunk_sizes(pattern, 0, made.video.shape[1])

  def last_step(start, frames, row):
    del row
    x, t = frames
    v = model.velocity(params, x, t, model.rewind(params, made.cache, start))
    x_0 = paths.data_prediction(x, v.astype(x.dtype), t)
    return start + x.shape[1], x_0

  _, video = over_chunks(
    jax.checkpoint(last_step),
    jnp.array(0, jnp.int32),
    sizes,
    (made.last_input, made.last_t),
    (),
  )
  return video


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generator:
  """Makes one chunk after another.

  Attributes:
    model: the network under its conditioning.
    params: what the last step of each chunk uses; gradients stop elsewhere.
    solver: how one step leads to the next.
    initial_scale: factor of the starting noise.
    commit_input: whether a last step may commit its input on the way.
  """

  model: ChunkModel
  params: Params
  solver: Solver
  initial_scale: float
  commit_input: bool

  @property
  def frozen(self) -> Params:
    return lax.stop_gradient(self.params)

  def generate(self, cache, frames, row):
    """Denoises and commits one chunk."""
    x, t = self._last_input(lax.stop_gradient(cache), frames.noise, row)

    def separately(cache):
      v = self.model.velocity(self.params, x, t, cache)
      x_0 = paths.data_prediction(x, v.astype(x.dtype), t)
      context = _context(x_0, x, t, frames.context_noise, row)
      _, cache = self.model.append(self.frozen, *context, cache)
      return cache, (x_0, x, t, *context)

    def together(cache):
      v, cache = self.model.append(self.frozen, x, t, cache)
      x_0 = paths.data_prediction(x, v.astype(x.dtype), t)
      return cache, (x_0, x, t, x, t)

    if not self.commit_input:
      return separately(cache)
    together_now = row.noisy & ~row.truncated
    return lax.cond(together_now, together, separately, cache)

  def commit_prefix(self, cache, frames, row):
    """Commits one chunk of given frames."""
    x_0, noise = frames
    t = jnp.zeros(x_0.shape[:2], x_0.dtype)
    context = _context(x_0, x_0, t, noise, row)
    _, cache = self.model.append(self.frozen, *context, cache)
    return cache, (x_0, x_0, t, *context)

  def _last_input(self, cache, noise, row):
    """Takes all steps but the last; a constant for the gradient."""
    at = lambda s: jnp.full(noise.shape[:2], row.times[s])

    def step(s, x):
      v = self._velocity(x, at(s), at(s + 1), cache)
      if self.solver != "consistency":
        return x - (row.times[s] - row.times[s + 1]) * v
      x_0 = paths.data_prediction(x, v, at(s))
      return paths.interpolate(x_0, noise[:, :, s + 1], at(s + 1))

    last = row.count - 1
    x = lax.fori_loop(0, last, step, self.initial_scale * noise[:, :, 0])
    return lax.stop_gradient((x, at(last)))

  def _velocity(self, x, t, end_time, cache):
    """Returns what a step follows from t to its end."""
    if self.solver != "mean_flow":
      v = self.model.velocity(self.frozen, x, t, cache)
    else:
      assert isinstance(self.model, MeanFlowChunkModel)  # _check_solver
      v = self.model.mean_velocity(self.frozen, x, t, end_time, cache)
    return v.astype(x.dtype)


def _context(
  x_0: Float[Array, "b f h w c"],
  last_input: Float[Array, "b f h w c"],
  last_t: Float[Array, "b f"],
  noise: Float[Array, "b f h w c"] | None,
  row: _Row,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f"]]:
  """Returns what is committed of a chunk, and its time, without gradient."""
  context, context_t = last_input, last_t
  if noise is not None:
    tau = jnp.full_like(last_t, row.context_t)
    renoised = paths.interpolate(x_0, noise, tau)
    context = jnp.where(row.truncated, renoised, last_input)
    context_t = jnp.where(row.truncated, tau, last_t)
  context = jnp.where(row.noisy, context, x_0)
  context_t = jnp.where(row.noisy, context_t, jnp.zeros_like(last_t))
  return lax.stop_gradient((context, context_t))


def _rows(times, counts, context_times, noisy) -> _Row:
  """Returns what each generated chunk is given of its schedule."""
  full = jnp.sum(times[:, :-1] > 0, axis=1, dtype=jnp.int32)
  if context_times is None:
    context_times = times[jnp.arange(len(times)), full - 1]
  return _Row(
    times=times,
    count=counts,
    truncated=counts < full,
    noisy=jnp.asarray(noisy),
    context_t=context_times.astype(times.dtype),
  )


def _prefix_rows(rows: _Row, noisy: np.ndarray) -> _Row:
  """Returns the first generated chunk's row for each chunk of a prefix."""
  repeated = jax.tree.map(lambda a: jnp.repeat(a[:1], len(noisy), 0), rows)
  return repeated._replace(
    noisy=jnp.asarray(noisy), truncated=jnp.ones(len(noisy), bool)
  )


def _check_solver(solver: str, model: ChunkModel) -> None:
  if solver == "mean_flow" and not isinstance(model, MeanFlowChunkModel):
    raise ValueError(
      '`solver="mean_flow"` needs a model with `mean_velocity`, which is told'
      f" where a jump ends; {type(model).__name__} has none. Use"
      ' "consistency" or "euler".'
    )


def _check_context(
  context, start: int, noise, prefix_chunks: int, frames: int
) -> None:
  if context not in ("clean", "last_step"):
    raise ValueError(
      f'`context` must be "clean" or "last_step"; got {context!r}.'
    )
  if context == "last_step" and start < prefix_chunks and noise is None:
    raise ValueError(
      "`context_noise` is needed to commit a prefix with noise; got None. "
      "Give noise for all frames, or a `context_start` of at least "
      f"{prefix_chunks}."
    )
  if noise is not None and noise.shape[1] != frames:
    raise ValueError(
      f"`context_noise` must hold noise for all {frames} frames, those of the "
      f"prefix included; got {noise.shape[1]} frames."
    )


def _check_context_times(context_times, chunks: int) -> None:
  if context_times is not None and context_times.shape != (chunks,):
    raise ValueError(
      f"`context_times` must hold one time per generated chunk, ({chunks},); "
      f"got {context_times.shape}."
    )
