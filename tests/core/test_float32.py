"""What the original computes in float64 keeps its digits in float32 here.

Every formula gets the same float32 numbers in both precisions, at noise levels
up to 5000 (times up to 0.9998), and may differ by 1e-5.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_losses as toy

from crcm_jax import losses, paths, sampling
from crcm_jax.losses import _examples
from crcm_jax.testing import GaussianTeacher
from crcm_jax.time_sampling import LogNormal, ShiftedUniform

SIGMAS = np.logspace(-3, np.log10(5000), 300)
TIMES = np.float32(SIGMAS / (1 + SIGMAS))
ANGLES = np.float32(np.arctan(SIGMAS))
LAW, WIDE_LAW = LogNormal(-0.8, 1.6), LogNormal(1.5, 1.6)
DRAWS = np.float32(np.linspace(-5, 5, 100))
PROBABILITIES = np.float32(np.linspace(1e-3, 1 - 1e-3, 100))

SCALARS = {
  "angle_from_time": (paths.angle_from_time, TIMES),
  "time_from_angle": (paths.time_from_angle, ANGLES),
  "shift_time": (lambda t: paths.shift_time(t, 5.0), TIMES),
  "unshift_time": (lambda t: paths.shift_time(t, 0.2), TIMES),
  "gaussian_bell_weight": (losses.gaussian_bell_weight, TIMES),
  "log_normal": (LAW.from_raw, DRAWS),
  "wide_log_normal": (WIDE_LAW.from_raw, DRAWS),
  "log_normal_cdf": (LAW.cdf, TIMES),
  "log_normal_icdf": (LAW.icdf, PROBABILITIES),
  "shifted_uniform": (ShiftedUniform(5.0).from_raw, PROBABILITIES),
  "shifted_uniform_cdf": (ShiftedUniform(5.0).cdf, TIMES),
}


def both(function, *arrays):
  """Returns a function of float32 numbers in float32, and in float64."""
  arrays = jax.tree.map(np.float32, arrays)
  single = jax.jit(function)(*jax.tree.map(jnp.asarray, arrays))
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda a: jnp.asarray(np.float64(a)), arrays)
    double = jax.jit(function)(*wide)
  leaves = jax.tree.leaves((single, double))
  half = len(leaves) // 2
  assert {a.dtype for a in leaves[:half]} == {jnp.dtype("float32")}
  assert {a.dtype for a in leaves[half:]} == {jnp.dtype("float64")}
  return jax.tree.map(lambda a: np.asarray(a, np.float64), (single, double))


def distance(single, double):
  """Returns each example's relative distance."""
  rows = lambda a: a.reshape(len(a), -1)
  error = np.linalg.norm(rows(single - double), axis=1)
  return error / np.linalg.norm(rows(double), axis=1)


@pytest.mark.parametrize("name", SCALARS)
def test_functions_of_times(name):
  single, double = both(*SCALARS[name])
  np.testing.assert_allclose(single, double, rtol=1e-5)


PATHS = {
  "interpolate": (paths.interpolate, TIMES),
  "data_prediction": (paths.data_prediction, TIMES),
  "trigflow_interpolate": (paths.trigflow_interpolate, ANGLES),
  "trigflow_data_prediction": (paths.trigflow_data_prediction, ANGLES),
  "trigflow_velocity": (
    lambda x, shift, a: paths.trigflow_velocity(
      lambda x, t: jnp.sin(x) * t[:, None] + shift
    )(x, a),
    ANGLES,
  ),
}


@pytest.mark.parametrize("name", PATHS)
def test_paths(name):
  function, times = PATHS[name]
  x, y = np.random.default_rng(0).normal(size=(2, len(times), 32))
  assert distance(*both(function, x, y, times)).max() < 1e-5


@pytest.mark.parametrize("sigma_max", [80.0, 5000.0])
@pytest.mark.parametrize("name", toy.LOSSES)
def test_losses_and_gradients(name, sigma_max):
  rng = np.random.default_rng(1)
  x_0, noise = rng.normal(size=(2, toy.B, toy.F, toy.C))
  levels = sigma_max * np.array([[1, 0.5, 0.1], [0.9, 0.01, 0.3]])
  t = levels / (1 + levels)
  if name.startswith("trigflow"):
    t = np.arctan(levels)

  def loss(params, x_0, noise, t):
    total = lambda p: toy.LOSSES[name](
      toy.velocity, p, toy.teacher, x_0, noise, t
    )
    value = total(params)[0]
    return value, jax.grad(lambda p: total(p)[0].sum())(params)

  (value, grads), (want, want_grads) = both(loss, toy.PARAMS, x_0, noise, t)
  np.testing.assert_allclose(value, want, rtol=1e-5)
  flat = lambda tree: np.concatenate([a.ravel() for a in tree.values()])[None]
  assert distance(flat(grads), flat(want_grads)) < 1e-5


@pytest.mark.parametrize("t", [1e-3, 0.5, 0.9998])
def test_score_differences_are_not_lost_in_the_sample(t):
  """Two scores that differ by little, about a sample that is large."""
  rng = np.random.default_rng(2)
  x_0, noise, v = rng.normal(size=(3, 4, 8, 16))
  x_0, change = 30 * x_0, 0.01 * rng.normal(size=v.shape)

  def matching(x_0, noise, v, change):
    times = jnp.full(v.shape[:1], t, v.dtype)
    real, fake = (lambda x, t: v), (lambda x, t: change)
    target, metrics = losses.distribution_matching_target(
      x_0, noise, times, real, fake
    )
    del target
    return metrics.gradient_norm, metrics.scale

  v = np.float32(v)
  change = v + np.float32(change)
  results = both(matching, x_0, noise, v, change)
  for single, double in zip(*results, strict=True):
    np.testing.assert_allclose(single, double, rtol=1e-5)


def test_norms_of_videos_and_of_spikes():
  """21 frames of 480p, whose squares are many, and too large to square."""
  x = np.random.default_rng(3).normal(size=(1, 21, 60, 104, 16))
  for size in (1.0, 1e-25, 1e25):
    single, double = both(lambda x: _examples.norm(x, None), size * x)
    np.testing.assert_allclose(single, double, rtol=1e-5)


TEACHER = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])


@pytest.mark.parametrize("sigma_max", [80.0, 5000.0])
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_solvers(solver, sigma_max):
  times = sampling.ode_schedule(50, sigma_max=sigma_max)
  noise = np.random.default_rng(4).normal(size=(16, 2))
  sample = lambda x: sampling.integrate(
    TEACHER.velocity, x, times, solver=solver
  )
  assert distance(*both(sample, noise)).max() < 1e-5


@pytest.mark.parametrize("sigma_max", [80.0, 5000.0])
def test_few_step_sampler(sigma_max):
  times = sampling.few_step_schedule(
    sampling.MID_TIMES["4"], sigma_max=sigma_max
  )
  draws = np.random.default_rng(5).normal(size=(4, 16, 2))
  sample = lambda noise, fresh: sampling.consistency_sample(
    TEACHER.consistency_velocity, noise, times, fresh
  )
  assert distance(*both(sample, draws[0], draws[1:])).max() < 1e-5
