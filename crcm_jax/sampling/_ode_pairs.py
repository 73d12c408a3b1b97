"""Pairs to initialise a few-step student with: where an ODE was, and ended.

The teacher's ODE dx/dt = v is followed from noise to data. What it passes at
the student's own times, with the data it arrives at, are the pairs (x_t, x_0)
of `losses.regression_loss`, whose solution is the teacher's flow map.

References:
  Yin et al., CausVid, https://arxiv.org/abs/2412.07772
  Huang et al., Self Forcing, https://arxiv.org/abs/2506.08009
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from crcm_jax import _times
from crcm_jax._times import wide
from crcm_jax._typing import Array, Float, Velocity
from crcm_jax.sampling._solvers import Solver, trajectory


class OdePairs(NamedTuple):
  """Points of one trajectory an example, and their common end.

  Attributes:
    x_t: the states at the times.
    t: the times, decreasing; 0 is left out.
    x_0: where the trajectories end.
  """

  x_t: Float[Array, "times b *shape"]
  t: Float[Array, "times"]
  x_0: Float[Array, "b *shape"]


def ode_pairs(
  velocity: Velocity,
  noise: Float[Array, "b *shape"],
  times: Float[np.ndarray, "grid"] | Float[Array, "grid"],
  *,
  steps: int,
  shift: float = 3.0,
  solver: Solver = "euler",
) -> OdePairs:
  """Follows a teacher's ODE, and keeps it at a few-step student's times.

  Args:
    velocity: the teacher, `velocity(x_t, t)` with t of shape `[b]`, guidance
      included.
    noise: standard normal draws; the trajectories start at `times[0] * noise`,
      as samplers do.
    times: the student's times, decreasing to 0: `few_step_schedule`.
    steps: solver steps, and evaluations of the teacher. They are spaced as by
      `ode_schedule`, and the nearest ones moved onto the student's times.
    shift: of that spacing.
    solver: as for `integrate`.

  Returns:
    The pairs, in at least float32. Their error is that of the solver.

  Raises:
    ValueError: if the times do not decrease within [0, 1] to 0, or there are
      too few steps to meet each of them.

  Example:
    >>> import jax
    >>> from crcm_jax.sampling import few_step_schedule, MID_TIMES
    >>> noise = jax.random.normal(jax.random.key(0), (8, 2))
    >>> still = lambda x, t: x / t[:, None]  # everything goes to 0
    >>> times = few_step_schedule(MID_TIMES["4"])
    >>> pairs = ode_pairs(still, noise, times, steps=48)
    >>> pairs.x_t.shape, float(abs(pairs.x_0).max()) < 1e-6
    ((4, 8, 2), True)
  """
  times = np.asarray(times, np.float64)
  _times.check_decreasing("times", times)
  _times.check_range("times", times)
  if times[-1] != 0:
    raise ValueError(f"`times` must end at 0, at data; got {times.tolist()}.")
  grid = _grid_through(times, steps, shift)
  noise = wide(noise)
  start = jnp.asarray(times[0], noise.dtype) * noise
  states = trajectory(velocity, start, grid, times, solver=solver)
  return OdePairs(states[:-1], jnp.asarray(times[:-1], noise.dtype), states[-1])


def _grid_through(times: np.ndarray, steps: int, shift: float) -> np.ndarray:
  """Returns a shifted grid of so many steps that meets all given times."""
  if shift <= 0:
    raise ValueError(f"`shift` must be positive, 1 for no shift; got {shift}.")
  u = times / (shift - (shift - 1) * times)  # the times before the shift
  even = np.linspace(u[0], 0.0, steps + 1)
  nearest = np.abs(even[:, None] - u[None]).argmin(axis=0)
  if len(set(nearest.tolist())) < len(u):
    raise ValueError(
      f"`steps` must be enough to meet each of the times {times.tolist()} with"
      f" a step of its own; got {steps}."
    )
  even[nearest] = u
  grid = shift * even / (1 + (shift - 1) * even)
  grid[nearest] = times  # exactly
  return grid
