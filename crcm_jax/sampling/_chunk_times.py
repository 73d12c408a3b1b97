"""Denoising schedules of all chunks as one padded array."""

from collections.abc import Sequence
from typing import get_args, Literal

import jax.core
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float, Int

Solver = Literal["consistency", "euler", "mean_flow"]
"""How one step of a rollout leads to the next."""


def chunk_times(
  schedules: Sequence[Sequence[float]], chunks: int
) -> tuple[Float[Array, "chunks grid"], Int[Array, "chunks"]]:
  """Lays per-chunk schedules out for `rollout`.

  Args:
    schedules: for each chunk its decreasing times, from the first step's to
      0; the last schedule serves all further chunks. None may have more
      steps than the one before it.
    chunks: number of chunks to generate.

  Returns:
    The times, padded with zeros, and each chunk's number of steps.

  Raises:
    ValueError: if there is no schedule, or if one does not decrease from at
      most 1 to 0, or has more steps than the one before it.

  Example:
    >>> times, counts = chunk_times([(1.0, 0.5, 0.0), (1.0, 0.0)], 3)
    >>> counts.tolist()
    [2, 1, 1]
  """
  rows = [np.asarray(s, np.float64) for s in schedules]
  if not rows:
    raise ValueError(
      "`schedules` must hold at least one schedule, such as (1.0, 0.5, 0.0);"
      " got none."
    )
  for row in rows:
    _check_schedule("schedules", row)
  lengths = [len(row) for row in rows]
  if sorted(lengths, reverse=True) != lengths:
    raise ValueError(
      "`schedules` must not grow longer from chunk to chunk; got "
      f"{[n - 1 for n in lengths]} steps."
    )
  rows = [rows[min(b, len(rows) - 1)] for b in range(chunks)]
  times = np.stack([np.pad(r, (0, lengths[0] - len(r))) for r in rows])
  counts = np.array([len(r) - 1 for r in rows], np.int32)
  return jnp.asarray(times, jnp.result_type(float)), jnp.asarray(counts)


def check_grid(step_noise, times, counts, chunks: int, solver: str) -> None:
  """Checks that noise, times and counts of a rollout belong together.

  Raises:
    ValueError: if they do not, or if a known schedule does not decrease.
  """
  if solver not in get_args(Solver):
    raise ValueError(
      f'`solver` must be "consistency", "euler" or "mean_flow"; got {solver!r}.'
    )
  if times.ndim != 2 or times.shape[0] != chunks:
    raise ValueError(
      f"`times` must hold one schedule per generated chunk, ({chunks}, "
      f"steps + 1); got {times.shape}. `chunk_times` lays schedules out."
    )
  if counts.shape != (chunks,):
    raise ValueError(
      f"`counts` must hold one number of steps per generated chunk, "
      f"({chunks},); got {counts.shape}."
    )
  steps = times.shape[1] - 1
  if solver == "consistency" and step_noise.shape[0] != steps:
    raise ValueError(
      f"`times` must be one longer than the steps of `step_noise`, "
      f"{step_noise.shape[0] + 1}; got {times.shape[1]}. Draw noise for "
      f"{steps} steps, or give a schedule of {step_noise.shape[0]}."
    )
  # Inside jit their values are not known; `chunk_times` has checked them.
  full = np.full(chunks, steps)
  if not isinstance(times, jax.core.Tracer):
    for b, row in enumerate(np.asarray(times, np.float64)):
      full[b] = np.count_nonzero(row > 0)
      _check_schedule("times", row[: full[b] + 1])
  if not isinstance(counts, jax.core.Tracer):
    taken = np.asarray(counts)
    if (taken < 1).any() or (taken > full).any():
      raise ValueError(
        "`counts` must lie between 1 and the steps of each chunk's schedule, "
        f"{full.tolist()}; got {taken.tolist()}."
      )


def _check_schedule(name: str, times: np.ndarray) -> None:
  falls = np.all(np.diff(times) < 0)
  if len(times) < 2 or not falls or times[0] > 1 or times[-1] != 0:
    raise ValueError(
      f"`{name}` must decrease from a first time of at most 1 to 0, as in "
      f"(1.0, 0.5, 0.0); got {tuple(times.tolist())}."
    )
