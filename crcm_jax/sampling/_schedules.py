"""Which times a sampler visits, from noise to data.

Schedules are host-side float64 arrays that decrease to 0. They start at
`sigma_max / (1 + sigma_max)`, the rectified-flow time of the largest noise
level, and not at 1, where the networks were never trained.
"""

from collections.abc import Sequence

import numpy as np

MID_TIMES: dict[str, tuple[float, ...]] = {
  "4": (15 / 16, 5 / 6, 5 / 8),
  "2": (5 / 6,),
  "2_noisy": (5 / 8,),
  "1": (),
}
"""Times between the first and the last of a chunk, by number of steps."""


def few_step_schedule(
  mid_times: Sequence[float], *, sigma_max: float = 1600.0
) -> np.ndarray:
  """Returns `[sigma_max / (1 + sigma_max), *mid_times, 0]`.

  Args:
    mid_times: the times where noise is added anew, such as `MID_TIMES["4"]`.
    sigma_max: the largest noise level.

  Returns:
    Times, float64 `[len(mid_times) + 2]`.

  Raises:
    ValueError: if the times do not decrease, or `sigma_max` is not positive.

  Example:
    >>> few_step_schedule(MID_TIMES["2_noisy"], sigma_max=3.0)
    array([0.75 , 0.625, 0.   ])
  """
  times = np.array([_first_time(sigma_max), *mid_times, 0.0])
  if (np.diff(times) >= 0).any():
    raise ValueError(
      f"`mid_times` must decrease within (0, {times[0]:.6g}), below the time"
      f" of `sigma_max`; got {tuple(mid_times)}."
    )
  return times


def ode_schedule(
  steps: int, *, shift: float = 3.0, sigma_max: float = 1600.0
) -> np.ndarray:
  """Returns times for an ODE solver, spaced evenly before the shift.

      u_i evenly from u_max to 0,   t_i = shift u_i / (1 + (shift - 1) u_i)

  Args:
    steps: number of solver steps.
    shift: moves the times towards noise; 1 spaces them evenly.
    sigma_max: the largest noise level, which fixes the first time.

  Returns:
    Times, float64 `[steps + 1]`.

  Raises:
    ValueError: if there is no step, or a setting is not positive.
  """
  if steps < 1:
    raise ValueError(f"`steps` must be at least 1; got {steps}.")
  if shift <= 0:
    raise ValueError(f"`shift` must be positive, 1 for no shift; got {shift}.")
  last = _first_time(sigma_max)
  u = np.linspace(last / (shift - (shift - 1) * last), 0.0, steps + 1)
  return shift * u / (1 + (shift - 1) * u)


def _first_time(sigma_max: float) -> float:
  """Returns the rectified-flow time of a noise level."""
  if sigma_max <= 0:
    raise ValueError(f"`sigma_max` must be positive; got {sigma_max}.")
  return sigma_max / (1 + sigma_max)
