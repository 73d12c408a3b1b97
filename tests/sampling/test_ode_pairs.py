"""Pairs of a known flow: they lie on its map, to the solver's order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import losses, sampling
from crcm_jax.testing import GaussianTeacher

TEACHER = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
TIMES = sampling.few_step_schedule(sampling.MID_TIMES["4"])


def made(steps, solver="euler"):
  noise = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)
  run = lambda noise: sampling.ode_pairs(
    TEACHER.velocity, noise, TIMES, steps=steps, solver=solver
  )
  return noise, jax.jit(run)(noise)


def exact(noise, t):
  """Where the flow takes the start of the trajectories."""
  at = lambda t: jnp.full(noise.shape[:1], t)
  return TEACHER.flow_map(TIMES[0] * noise, at(TIMES[0]), at(t))


def error(steps, solver):
  noise, pairs = made(steps, solver)
  gaps = [
    jnp.abs(x - exact(noise, t)).max()
    for x, t in zip((*pairs.x_t, pairs.x_0), TIMES, strict=True)
  ]
  return float(max(gaps))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_pairs_lie_on_the_flow_map(solver, order):
  with jax.enable_x64(True):
    coarse, fine = error(160, solver), error(640, solver)
  np.testing.assert_allclose(np.log2(coarse / fine) / 2, order, atol=0.15)
  assert fine < {"euler": 1e-2, "unipc": 1e-4}[solver]


def test_pairs_are_of_the_students_times():
  with jax.enable_x64(True):
    noise, pairs = made(12)
  np.testing.assert_array_equal(pairs.t, TIMES[:-1])
  np.testing.assert_array_equal(pairs.x_t[0], TIMES[0] * np.asarray(noise))
  assert pairs.x_t.shape == (4, 16, 2)


def test_the_consistency_function_solves_the_regression():
  """The loss of the exact student is the solver's error, and no other's."""
  with jax.enable_x64(True):
    _, pairs = made(400, "unipc")
    exactly = lambda p, x, t: TEACHER.consistency_velocity(x, t) + p
    for x_t, t in zip(pairs.x_t, pairs.t, strict=True):
      t = jnp.full(x_t.shape[:1], t)
      loss, _ = losses.regression_loss(exactly, 0.0, x_t, pairs.x_0, t)
      off, _ = losses.regression_loss(exactly, 0.1, x_t, pairs.x_0, t)
      assert float(loss.max()) < 1e-6 < 1e-3 < float(off.min())


def test_a_trajectory_ends_where_integration_does():
  noise = jax.random.normal(jax.random.key(0), (3, 2))
  times = sampling.ode_schedule(6)
  for solver in ("euler", "unipc"):
    states = sampling.trajectory(
      TEACHER.velocity, noise, times, times, solver=solver
    )
    end = sampling.integrate(TEACHER.velocity, noise, times, solver=solver)
    np.testing.assert_array_equal(states[-1], end)
    np.testing.assert_array_equal(states[0], noise)


@pytest.mark.usefixtures("unchecked")
def test_messages():
  noise = jnp.ones((1, 2))
  pairs = lambda times, **more: sampling.ode_pairs(
    TEACHER.velocity, noise, np.array(times), **({"steps": 8} | more)
  )
  with pytest.raises(ValueError, match="`times` must end at 0"):
    pairs([0.9, 0.5])
  with pytest.raises(ValueError, match="`times` must decrease"):
    pairs([0.5, 0.9, 0.0])
  with pytest.raises(ValueError, match="`steps` must be enough to meet"):
    pairs([0.9, 0.5, 0.0], steps=1)
  with pytest.raises(ValueError, match="`shift` must be positive"):
    pairs([0.9, 0.0], shift=0.0)
  with pytest.raises(ValueError, match="`stops` must be among the times"):
    sampling.trajectory(
      TEACHER.velocity, noise, np.array([0.9, 0.0]), np.array([0.5])
    )
