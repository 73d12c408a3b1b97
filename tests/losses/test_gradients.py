"""Gradients reach the student and nothing else, and removed frames not at all.

Frozen networks are closures, and a closure may hold anything: here it holds
the very parameters that are differentiated.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_losses as toy

from crcm_jax import losses, paths

DISCRETE = ["discrete", "trigflow_discrete"]


def half(params):
  """A frozen network made of some parameters."""
  return lambda x, t: 0.5 * toy.velocity(params, x, t)


def assert_equal(grads, expected):
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected[key], rtol=1e-5, atol=1e-7)


def gradient(name, frozen_params, **frozen):
  """Returns a loss's gradient with frozen networks of given parameters."""
  x_0, noise, t = toy.batch()

  def total(p):
    held = frozen_params(p)
    others = {key: make(held) for key, make in frozen.items()}
    loss = toy.LOSSES[name](
      toy.velocity, p, half(held), x_0, noise, t, **others
    )
    return loss[0].sum()

  return jax.jit(jax.grad(total))(toy.PARAMS)


@pytest.mark.parametrize("name", toy.WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
  assert_equal(
    gradient(name, lambda p: p), gradient(name, lambda _: toy.PARAMS)
  )


@pytest.mark.parametrize("name", DISCRETE)
def test_no_gradient_reaches_the_target_network(name):
  assert_equal(
    gradient(name, lambda p: p, target=half),
    gradient(name, lambda _: toy.PARAMS, target=half),
  )


def test_no_gradient_reaches_the_scores_or_the_target():
  x_0, noise, t = toy.batch()

  def target(p):
    sample = x_0 - toy.velocity(p, x_0, t)
    return losses.distribution_matching_target(
      sample, noise, t, half(p), lambda x, t: -half(p)(x, t)
    )[0]

  grads = jax.grad(lambda p: target(p).sum())(toy.PARAMS)
  assert all((g == 0).all() for g in jax.tree.leaves(grads))
  attract = lambda y: losses.target_matching_loss(x_0, y).sum()
  np.testing.assert_array_equal(jax.grad(attract)(target(toy.PARAMS)), 0)


@pytest.mark.parametrize("name", toy.LOSSES)
def test_the_student_has_a_gradient(name):
  """Guards the tests above against losses that stop everything."""
  grads = gradient(name, lambda _: toy.PARAMS)
  assert all((g != 0).any() for g in jax.tree.leaves(grads))


def test_distribution_matching_divides_by_no_less_than_its_smallest_scale():
  x_0 = jnp.ones((1, 2))
  t = jnp.array([0.5])
  x_t = 0.5 * x_0  # under noise of zero
  exact = lambda x, t: (x_t - x_0) / t[:, None]  # predicts x_0 itself
  off = lambda x, t: exact(x, t) - 2e-5
  _, metrics = losses.distribution_matching_target(x_0, 0 * x_0, t, exact, off)
  np.testing.assert_allclose(metrics.scale, 1e-5, rtol=1e-6)
  # f - r = 1e-5 in each of two features.
  np.testing.assert_allclose(metrics.gradient_norm, np.sqrt(2), rtol=2e-2)


@pytest.mark.parametrize("name", toy.LOSSES)
def test_a_removed_frame_may_overflow(name):
  """Its weight selects, it does not multiply: 0 * infinity is NaN."""
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F)).at[:, 0].set(0)
  huge = x_0.at[:, 0].set(1e30)  # finite, its square is not

  @jax.jit
  def run(x_0):
    def total(p):
      loss = toy.LOSSES[name](
        toy.velocity,
        p,
        toy.teacher,
        x_0,
        noise,
        t,
        frame_weight=weight,
      )
      return loss[0].sum(), loss[0]

    return jax.grad(total, has_aux=True)(toy.PARAMS)

  grads, loss = run(huge)
  expected_grads, expected = run(x_0)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  assert_equal(grads, expected_grads)


def test_a_removed_frame_does_not_follow_the_teacher():
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F)).at[:, 0].set(0)
  seen = []

  def target(x, t):
    seen.append(x)
    return toy.teacher(x, t)

  times = jnp.stack([t, 0.5 * t], axis=-1)
  losses.discrete_consistency_loss(
    toy.velocity,
    toy.PARAMS,
    toy.teacher,
    x_0,
    noise,
    times,
    target=target,
    frame_weight=weight,
  )
  still = seen[0] == paths.interpolate(x_0, noise, t)
  assert still[:, 0].all()
  assert not still[:, 1:].any()
