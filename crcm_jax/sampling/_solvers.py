"""Solvers of the probability-flow ODE `dx/dt = v(x, t)`.

A solver step is linear in states and data predictions: with the state x at
t_i, the state y before the last step, and the data predictions m of this step
and the two before,

    x' = a x + b y + c_0 m_i + c_1 m_{i-1} + c_2 m_{i-2}     (correct)
    x'' = a' x' + d_0 m_i + d_1 m_{i-1}                      (predict)

so a solver is a table of coefficients, and one scan runs any of them.

References:
  Zhao et al., UniPC, https://arxiv.org/abs/2302.04867
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import _times, paths
from crcm_jax._times import wide
from crcm_jax._typing import Array, Float, Velocity

Solver = Literal["euler", "unipc"]


class _Table(NamedTuple):
  """Coefficients of each step, `[steps, ...]`."""

  correct: np.ndarray
  """of (x, previous x, m_i, m_{i-1}, m_{i-2})."""
  predict: np.ndarray
  """of (corrected x, m_i, m_{i-1})."""


def integrate(
  velocity: Velocity,
  x: Float[Array, "b *shape"],
  times: Float[np.ndarray, "times"] | Float[Array, "times"],
  *,
  solver: Solver = "euler",
) -> Float[Array, "b *shape"]:
  """Follows the ODE from noise to data.

  Args:
    velocity: `velocity(x_t, t)` with t of shape `[b]`; a network that wants a
      time per frame repeats it.
    x: the state at `times[0]`.
    times: decreasing times, known at trace time; `ode_schedule` makes them.
    solver: "euler", of first order, or "unipc": UniPC in its `bh2` form for
      data predictions, of second order with a corrector, first order in the
      first and the last step.

  Returns:
    The state at `times[-1]`, in at least float32.

  Raises:
    ValueError: if the times do not decrease within [0, 1], are fewer than
      two, or the solver is unknown; UniPC cannot start at t = 1.
  """
  times = np.asarray(times, np.float64)
  return trajectory(velocity, x, times, times[-1:], solver=solver)[0]


def trajectory(
  velocity: Velocity,
  x: Float[Array, "b *shape"],
  times: Float[np.ndarray, "times"] | Float[Array, "times"],
  stops: Float[np.ndarray, "stops"] | Float[Array, "stops"],
  *,
  solver: Solver = "euler",
) -> Float[Array, "stops b *shape"]:
  """Follows the ODE as `integrate` does, and keeps the states on the way.

  Args:
    velocity: see `integrate`.
    x: the state at `times[0]`.
    times: decreasing times, known at trace time.
    stops: those of them whose states to keep; memory grows with them alone.
    solver: see `integrate`.

  Returns:
    The states at the stops, in at least float32.

  Raises:
    ValueError: as `integrate`, or if a stop is not among the times.
  """
  times = np.asarray(times, np.float64)
  _times.check_decreasing("times", times)
  _times.check_range("times", times)
  table = _table(solver, times)
  slots = _slots(times, np.asarray(stops, np.float64))
  x_start = wide(x)

  def step(carry, inputs):
    x, previous, m_1, m_2, kept = carry
    slot, (t, correct, predict) = inputs
    t = jnp.broadcast_to(t, x.shape[:1])
    m_0 = paths.data_prediction(x, wide(velocity(x, t)), t)
    corrected = _combine(correct, (x, previous, m_0, m_1, m_2))
    kept = kept.at[slot].set(corrected, mode="drop")
    x = _combine(predict, (corrected, m_0, m_1))
    return (x, corrected, m_0, m_1, kept), None

  zero = jnp.zeros_like(x_start)
  kept = jnp.zeros((len(stops), *zero.shape), zero.dtype)
  inputs = (times[:-1], table.correct, table.predict)
  inputs = jax.tree.map(lambda a: jnp.asarray(a, x_start.dtype), inputs)
  carry = (x_start, x_start, zero, zero, kept)
  (x, *_, kept), _ = jax.lax.scan(step, carry, (slots[:-1], inputs))
  return kept.at[slots[-1]].set(x, mode="drop")


def _slots(times: np.ndarray, stops: np.ndarray) -> np.ndarray:
  """Returns where each time's state is kept; past the end for nowhere."""
  here = times[:, None] == stops[None]
  if not here.any(axis=0).all():
    raise ValueError(
      f"`stops` must be among the times {times.tolist()}; got {stops.tolist()}."
    )
  nowhere = len(stops)
  return np.where(here.any(axis=1), here.argmax(axis=1), nowhere)


def _combine(coefficients: Array, states: tuple[Array, ...]) -> Array:
  """Returns the linear combination of states."""
  return sum(
    (coefficients[i] * state for i, state in enumerate(states[1:], 1)),
    coefficients[0] * states[0],
  )


def _table(solver: Solver, times: np.ndarray) -> _Table:
  """Returns a solver's coefficients for the given times."""
  if solver == "euler":
    return _euler_table(times)
  if solver != "unipc":
    raise ValueError(f'`solver` must be "euler" or "unipc"; got {solver!r}.')
  if times[0] >= 1:
    raise ValueError(
      "`times` must start below 1 for UniPC, whose steps are in the logarithm"
      " of the signal-to-noise ratio. `ode_schedule` does."
    )
  return _unipc_table(times)


def _euler_table(times: np.ndarray) -> _Table:
  """Returns `x + (t' - t) v`, with `v = (x - m) / t`."""
  steps, ratio = len(times) - 1, times[1:] / times[:-1]
  predict = np.stack([ratio, 1 - ratio, np.zeros(steps)], axis=1)
  return _Table(_keep_state(steps), predict)


def _keep_state(steps: int) -> np.ndarray:
  """Returns the corrector that changes nothing."""
  return np.tile(np.array([1.0, 0, 0, 0, 0]), (steps, 1))


def _unipc_table(times: np.ndarray) -> _Table:
  """Returns UniPC-2's coefficients, one predictor and corrector a step.

  The corrector at `times[i]` redoes the step from `times[i - 1]` with the
  data prediction at its end, which costs no evaluation.
  """
  steps = len(times) - 1
  correct, predict = _keep_state(steps), np.zeros((steps, 3))
  orders = [2 if 0 < i < steps - 1 else 1 for i in range(steps)]
  for i in range(steps):
    predict[i] = _predictor(times, i, orders[i])
    if i:
      correct[i] = _corrector(times, i - 1, orders[i - 1])
  return _Table(correct, predict)


def _half_log_snr(t: float) -> float:
  """Returns `lambda = log((1 - t) / t)`, infinite at t = 0."""
  return np.inf if t == 0 else float(np.log1p(-t) - np.log(t))


def _predictor(times: np.ndarray, i: int, order: int) -> np.ndarray:
  """Returns the predictor's coefficients of (x, m_i, m_{i-1}).

  x' = (t' / t) x - (1 - t') B m_i - (1 - t') B D / 2
  B = expm1(-h),  D = (m_{i-1} - m_i) / r,  r = (l_{i-1} - l_i) / h
  """
  t, t_next = times[i], times[i + 1]
  b = np.expm1(_half_log_snr(t) - _half_log_snr(t_next))
  signal = (1 - t_next) * b
  if order == 1:
    return np.array([t_next / t, -signal, 0.0])
  half = 0.5 * signal / _ratio(times, i)
  return np.array([t_next / t, -signal + half, -half])


def _corrector(times: np.ndarray, i: int, order: int) -> np.ndarray:
  """Returns the corrector's coefficients of the step from `times[i]`.

  They weigh (x, x_i, m_{i+1}, m_i, m_{i-1}). The weights rho of the
  differences solve UniPC's order conditions, here 2 x 2 at most.
  """
  t, t_next = times[i], times[i + 1]
  h = _half_log_snr(t_next) - _half_log_snr(t)
  b = np.expm1(-h)
  signal = (1 - t_next) * b
  if order == 1:
    rho, back = 0.5, 0.0
  else:
    r = _ratio(times, i)
    phi_2 = b / -h - 1
    phi_3 = phi_2 / -h - 0.5
    conditions = np.array([[1.0, 1.0], [r, 1.0]])
    rho_back, rho = np.linalg.solve(
      conditions, np.array([phi_2 / b, 2 * phi_3 / b])
    )
    back = rho_back / r
  now = -signal * (1 - back - rho)
  return np.array([0.0, t_next / t, -signal * rho, now, -signal * back])


def _ratio(times: np.ndarray, i: int) -> float:
  """Returns the last step over this one, in half log-SNR; negative."""
  last, now, later = (_half_log_snr(times[j]) for j in (i - 1, i, i + 1))
  return (last - now) / (later - now)
