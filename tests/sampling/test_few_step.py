"""The few-step sampler: exact at a consistency function, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import sampling
from crcm_jax.testing import GaussianTeacher


def test_a_step_denoises_and_adds_noise():
  velocity = lambda x, t: x  # f(x, t) = (1 - t) x
  noise, fresh = jnp.full((1, 2), 3.0), jnp.full((1, 1, 2), 5.0)
  times = np.array([0.8, 0.5, 0.0])
  x = sampling.consistency_sample(velocity, noise, times, fresh)
  middle = 0.5 * (1 - 0.8) * (0.8 * 3) + 0.5 * 5
  np.testing.assert_allclose(x, (1 - 0.5) * middle, rtol=1e-6)


@pytest.mark.parametrize("steps", ["1", "2", "4"])
def test_the_exact_consistency_function_samples_the_data(steps):
  teacher = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
  times = sampling.few_step_schedule(sampling.MID_TIMES[steps])
  start, between = jax.random.split(jax.random.key(0))
  noise = jax.random.normal(start, (20000, 2))
  fresh = jax.random.normal(between, (len(times) - 2, 20000, 2))
  velocity = jax.jit(teacher.consistency_velocity)
  x = sampling.consistency_sample(velocity, noise, times, fresh)
  np.testing.assert_allclose(x.mean(0), teacher.mean, atol=0.02)
  np.testing.assert_allclose(np.cov(x.T), teacher.covariance, atol=0.02)


def test_schedules_and_draws_that_do_not_fit_are_refused():
  noise, still = jnp.ones((1, 2)), lambda x, t: 0 * x
  none = jnp.ones((0, 1, 2))
  with pytest.raises(ValueError, match="`step_noise` must hold one draw"):
    sampling.consistency_sample(still, noise, np.array([0.9, 0.5, 0.0]), none)
  with pytest.raises(ValueError, match="`times` must decrease"):
    sampling.consistency_sample(still, noise, np.array([0.0, 0.0]), none)
  with pytest.raises(ValueError, match="`times` must end at 0"):
    sampling.consistency_sample(still, noise, np.array([0.9, 0.1]), none)
