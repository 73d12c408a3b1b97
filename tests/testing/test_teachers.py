"""Exact teachers: their definitions, checked by differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.testing import GaussianTeacher, MixtureTeacher

GAUSSIAN = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
MIXTURE = MixtureTeacher([[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.1], [0.7, 0.3])
X = jnp.array([[0.3, -1.2], [1.5, 0.4]])
T = jnp.array([0.3, 0.8])


def gaussian_density(x, t):
  c = (1 - t) ** 2 * GAUSSIAN.covariance + t**2 * np.eye(2)
  y = x - (1 - t) * GAUSSIAN.mean
  return -0.5 * y @ jnp.linalg.solve(c, y) - 0.5 * jnp.linalg.slogdet(c)[1]


def mixture_density(x, t):
  parts = []
  for mean, std, weight in zip(
    MIXTURE.means, MIXTURE.stds, MIXTURE.weights, strict=True
  ):
    c = (1 - t) ** 2 * std**2 + t**2
    y = x - (1 - t) * mean
    parts.append(jnp.log(weight) - y @ y / (2 * c) - jnp.log(c))
  return jax.nn.logsumexp(jnp.stack(parts))


@pytest.mark.parametrize(
  ("teacher", "density"),
  [(GAUSSIAN, gaussian_density), (MIXTURE, mixture_density)],
)
def test_score_and_velocity_belong_to_the_density(teacher, density):
  with jax.enable_x64(True):
    x, t = X.astype(jnp.float64), T.astype(jnp.float64)
    score = jax.jit(jax.vmap(jax.grad(density)))(x, t)
    time = t[:, None]
    # Tweedie: E[noise | x] = -t score, and E[x_0 | x] from x_t.
    noise = -time * score
    velocity = noise - (x - time * noise) / (1 - time)
    np.testing.assert_allclose(teacher.score(x, t), score, rtol=1e-9)
    np.testing.assert_allclose(teacher.velocity(x, t), velocity, rtol=1e-9)


def test_the_flow_map_solves_the_ode():
  with jax.enable_x64(True):
    x, t = X.astype(jnp.float64), T.astype(jnp.float64)
    ones = jnp.ones_like(t)
    _, speed = jax.jvp(lambda s: GAUSSIAN.flow_map(x, t, s), (t,), (ones,))
    np.testing.assert_allclose(speed, GAUSSIAN.velocity(x, t), rtol=1e-9)
    there = GAUSSIAN.flow_map(x, t, t / 2)
    back = GAUSSIAN.flow_map(there, t / 2, t)
    np.testing.assert_allclose(back, x, rtol=1e-9)
    np.testing.assert_allclose(
      x - t[:, None] * GAUSSIAN.consistency_velocity(x, t),
      GAUSSIAN.consistency_function(x, t),
      rtol=1e-9,
    )


def test_the_data_may_lie_in_a_subspace():
  teacher = GaussianTeacher([1.0, 0.0], np.outer([0.6, 0.8], [0.6, 0.8]))
  ends = teacher.consistency_function(X, T)
  for x_0 in (ends, teacher.sample(jax.random.key(0), 5)):
    off = (x_0 - jnp.array([[1.0, 0.0]])) @ jnp.array([-0.8, 0.6])
    np.testing.assert_allclose(off, 0, atol=1e-5)
  assert jnp.isfinite(teacher.score(X, T)).all()


@pytest.mark.parametrize("teacher", [GAUSSIAN, MIXTURE])
def test_samples_have_the_datas_moments(teacher):
  x = teacher.sample(jax.random.key(0), 20000)
  zero = jnp.full((1,), 1.0)
  mean = -teacher.velocity(jnp.zeros((1, 2)), zero)[0]  # E[x_0] at t = 1
  np.testing.assert_allclose(x.mean(0), mean, atol=0.02)


def test_an_event_may_have_axes_and_times_may_be_per_frame():
  teacher = GaussianTeacher(np.zeros((2, 3)), np.eye(6))
  x, t = jnp.ones((4, 5, 2, 3)), jnp.full((4, 5), 0.5)
  # Unit data has unit-variance-like symmetry: v = 0 in the middle.
  np.testing.assert_allclose(teacher.velocity(x, t), 0, atol=1e-6)
  assert teacher.sample(jax.random.key(0), 7).shape == (7, 2, 3)


def test_what_is_no_distribution_is_refused():
  with pytest.raises(ValueError, match="`covariance` must be of shape"):
    GaussianTeacher([0.0, 0.0], [[1.0]])
  with pytest.raises(ValueError, match="`covariance` must be symmetric"):
    GaussianTeacher([0.0, 0.0], [[1.0, 1.0], [0.0, 1.0]])
  with pytest.raises(ValueError, match="no negative eigenvalue"):
    GaussianTeacher([0.0, 0.0], [[1.0, 0.0], [0.0, -1.0]])
  with pytest.raises(ValueError, match="`means` must be"):
    MixtureTeacher([[0.0]], [1.0, 1.0])
  with pytest.raises(ValueError, match="`weights` must hold one probability"):
    MixtureTeacher([[0.0]], [1.0], [0.5])
