"""The rollout as a stream: each chunk is there as soon as it is made.

`rollout` is one program that returns a whole video. Here one network call is
one program, and the host strings them together: it knows the schedules, so
nothing is decided on the device, and it never waits for the device, so calls
follow one another without a gap. A call is compiled once for all chunks of a
size, all steps, all schedules and all conditionings: where the chunk starts and
what the cache holds are data. The cache is donated and written in place.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from crcm_jax import paths
from crcm_jax._times import wide_dtype
from crcm_jax._typing import Array, Float, Params
from crcm_jax.chunks import ChunkPattern
from crcm_jax.sampling._chunk_model import Cache, ChunkModel
from crcm_jax.sampling._chunk_scan import chunk_sizes
from crcm_jax.sampling._chunk_times import check_grid, chunk_times


class Step(NamedTuple):
  """Which denoising step a call is, known at run time."""

  index: Any
  """of the noise that is added after it."""
  start: Any
  """first frame of the chunk within the noise."""
  t: Any
  t_next: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """Generates a video chunk by chunk, as `rollout` does, without gradients.

  Attributes:
    model: makes the chunk model of a conditioning, any pytree of arrays.
    solver: how one step leads to the next; see `rollout`.
    context: what is committed of a finished chunk; see `rollout`.
    context_start: with "last_step", chunks before this one are committed clean.
    initial_scale: factor of the starting noise.

  Example:
    >>> class Still:  # Knows no past; every video is zero: v = x / t.
    ...   def init(self, params, batch, frames):
    ...     return jnp.zeros(())
    ...   def velocity(self, params, x, t, cache):
    ...     return x / t[..., None, None, None]
    ...   def append(self, params, x, t, cache):
    ...     return x, cache + x.shape[1]
    ...   def rewind(self, params, cache, frames):
    ...     return cache
    >>> stream = Stream(model=lambda caption: Still())
    >>> noise = jax.random.normal(jax.random.key(0), (2, 1, 7, 4, 4, 3))
    >>> chunks = stream({}, (), noise, ChunkPattern(1, 3), [(1.0, 0.5, 0.0)])
    >>> [chunk.shape[1] for chunk in chunks]
    [1, 3, 3]
  """

  model: Callable[[Any], ChunkModel]
  solver: Literal["consistency", "euler"] = "consistency"
  context: Literal["clean", "last_step"] = "clean"
  context_start: int = 0
  initial_scale: float = 1.0

  def __call__(
    self,
    params: Params,
    conditioning: Any,
    step_noise: Float[Array, "steps b f h w c"],
    pattern: ChunkPattern,
    schedules: Sequence[Sequence[float]],
    *,
    prefix: Float[Array, "b p h w c"] | None = None,
    prefix_noise: Float[Array, "b p h w c"] | None = None,
  ) -> Iterator[Float[Array, "b n h w c"]]:
    """Returns the chunks in order, each on its way when it is asked for.

    A chunk is returned before it is committed: what the caller starts with it,
    such as decoding, is not behind that call.

    Args:
      params: the network's parameters.
      conditioning: what `model` takes.
      step_noise: standard normal noise of each step; see `rollout`.
      pattern: how frames form chunks.
      schedules: each generated chunk's times down to 0, as for `chunk_times`.
      prefix: given clean frames before the generated ones: whole chunks. They
        are returned first.
      prefix_noise: standard normal noise for them, where they are not
        committed clean.

    Raises:
      ValueError: if frames do not fit the pattern, if the schedules do not fit
        the noise or do not decrease, or if noise of the prefix is missing.
    """
    given = 0 if prefix is None else prefix.shape[1]
    sizes, skip = chunk_sizes(pattern, given, step_noise.shape[2])
    times, counts = chunk_times(schedules, len(sizes) - skip)
    check_grid(step_noise, times, counts, len(sizes) - skip, self.solver)
    noisy_prefix = self.context == "last_step" and self.context_start < skip
    if noisy_prefix and prefix_noise is None:
      raise ValueError(
        "`prefix_noise` is needed to commit a prefix with noise; got None. "
        f"Give noise of its shape, or a `context_start` of at least {skip}."
      )
    rows = [(*filter(None, row), 0.0) for row in np.asarray(times).tolist()]
    return self._run(
      params,
      conditioning,
      step_noise.astype(wide_dtype(step_noise.dtype)),
      sizes,
      skip,
      rows,
      prefix,
      prefix_noise,
    )

  def _run(
    self,
    params: Params,
    conditioning: Any,
    noise: Array,
    sizes: Sequence[int],
    skip: int,
    schedules: Sequence[tuple[float, ...]],
    prefix: Array | None,
    prefix_noise: Array | None,
  ) -> Iterator[Array]:
    network = (params, conditioning)
    number = functools.partial(np.asarray, dtype=noise.dtype)
    cache = self.init(*network, noise.shape[1], sum(sizes))
    start = 0
    for b, size in enumerate(sizes[:skip]):
      part = lambda a, i=start, j=start + size: a[:, i:j].astype(noise.dtype)
      x = part(prefix)
      yield x
      context, t = x, 0.0
      if self._is_noisy(b):
        t = schedules[0][-2]
        level = jnp.full(x.shape[:2], t, x.dtype)
        context = paths.interpolate(x, part(prefix_noise), level)
      cache = self.commit(*network, cache, context, number(t))
      start += size
    start = 0  # within the noise, which is that of the generated frames
    for b, schedule in enumerate(schedules, skip):
      last = b == len(sizes) - 1  # nobody looks back on it
      on_the_way = self._is_noisy(b) and not last
      x = self.start(noise, np.int32(start), size=sizes[b])
      for s, (t, t_next) in enumerate(itertools.pairwise(schedule), 1):
        at = Step(np.int32(s), np.int32(start), number(t), number(t_next))
        if t_next == 0 and on_the_way:
          x, cache = self.step_and_commit(*network, cache, x, noise, at)
        else:
          x = self.step(*network, cache, x, noise, at)
      yield x
      if not (on_the_way or last):
        cache = self.commit(*network, cache, x, number(0.0))
      start += sizes[b]

  def _is_noisy(self, chunk: int) -> bool:
    return self.context == "last_step" and chunk >= self.context_start

  @functools.partial(jax.jit, static_argnames=("self", "batch", "frames"))
  def init(
    self, params: Params, conditioning: Any, batch: int, frames: int
  ) -> Cache:
    """Returns an empty cache."""
    return self.model(conditioning).init(params, batch, frames)

  @functools.partial(jax.jit, static_argnames=("self", "size"))
  def start(
    self, step_noise: Float[Array, "steps b f h w c"], start: Any, *, size: int
  ) -> Float[Array, "b n h w c"]:
    """Returns where a chunk of `size` frames starts."""
    noise = lax.dynamic_slice_in_dim(step_noise[0], start, size, axis=1)
    return self.initial_scale * noise

  @functools.partial(jax.jit, static_argnames="self")
  def step(
    self,
    params: Params,
    conditioning: Any,
    cache: Cache,
    x: Float[Array, "b n h w c"],
    step_noise: Float[Array, "steps b f h w c"],
    at: Step,
  ) -> Float[Array, "b n h w c"]:
    """Takes one denoising step of the next chunk; the cache is only read."""
    t = jnp.full(x.shape[:2], at.t)
    v = self.model(conditioning).velocity(params, x, t, cache)
    return self._after(x, v, t, step_noise, at)

  @functools.partial(jax.jit, static_argnames="self", donate_argnames="cache")
  def step_and_commit(
    self,
    params: Params,
    conditioning: Any,
    cache: Cache,
    x: Float[Array, "b n h w c"],
    step_noise: Float[Array, "steps b f h w c"],
    at: Step,
  ) -> tuple[Float[Array, "b n h w c"], Cache]:
    """Takes a chunk's last step and commits its input on the way."""
    t = jnp.full(x.shape[:2], at.t)
    v, cache = self.model(conditioning).append(params, x, t, cache)
    return self._after(x, v, t, step_noise, at), cache

  @functools.partial(jax.jit, static_argnames="self", donate_argnames="cache")
  def commit(
    self,
    params: Params,
    conditioning: Any,
    cache: Cache,
    x: Float[Array, "b n h w c"],
    t: Any,
  ) -> Cache:
    """Commits a chunk at time `t`."""
    t = jnp.full(x.shape[:2], t)
    return self.model(conditioning).append(params, x, t, cache)[1]

  def _after(
    self, x: Array, v: Array, t: Array, step_noise: Array, at: Step
  ) -> Array:
    """Goes from `at.t` to `at.t_next`; to 0 by data prediction."""
    v = v.astype(x.dtype)
    if self.solver == "euler":
      return x - (at.t - at.t_next) * v
    x_0 = paths.data_prediction(x, v, t)
    place = (at.index, 0, at.start, 0, 0, 0)
    noise = lax.dynamic_slice(step_noise, place, (1, *x.shape))[0]
    return paths.interpolate(x_0, noise, jnp.full_like(t, at.t_next))
