"""Frame weights, independence of examples, dtypes, and error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_losses as toy

from crcm_jax import losses


@functools.partial(jax.jit, static_argnames="name")
def run(name, params, x_0, noise, t, frame_weight):
  def total(p):
    per_example, _ = toy.LOSSES[name](
      toy.velocity,
      p,
      toy.teacher,
      x_0,
      noise,
      t,
      frame_weight=frame_weight,
    )
    return per_example.sum(), per_example

  return jax.grad(total, has_aux=True)(params)


@pytest.mark.parametrize("name", toy.LOSSES)
def test_a_frame_of_weight_zero_is_as_if_absent(name):
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F)).at[:, 0].set(0)
  grads, loss = run(name, toy.PARAMS, x_0, noise, t, weight)
  rest = (a[:, 1:] for a in (x_0, noise, t, weight))
  expected_grads, expected = run(name, toy.PARAMS, *rest)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected_grads[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", toy.LOSSES)
def test_an_examples_loss_ignores_its_batch(name):
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F))
  _, loss = run(name, toy.PARAMS, x_0, noise, t, weight)
  order = jnp.array([1, 0])
  _, swapped = run(
    name, toy.PARAMS, *(a[order] for a in (x_0, noise, t, weight))
  )
  np.testing.assert_allclose(swapped, loss[order], rtol=1e-6)


def test_a_removed_frame_has_no_tangent():
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F)).at[:, 0].set(0)

  def mixing(params, x, t):  # every frame reads frame 0
    return toy.velocity(params, x, t) + jnp.cos(3 * x[:, :1] + t[:, :1, None])

  frozen_first = lambda params, x, t: mixing(
    params,
    x.at[:, 0].set(jax.lax.stop_gradient(x[:, 0])),
    t.at[:, 0].set(jax.lax.stop_gradient(t[:, 0])),
  )
  loss = functools.partial(
    losses.continuous_consistency_loss,
    params=toy.PARAMS,
    teacher=toy.teacher,
    x_0=x_0,
    noise=noise,
    t=t,
    frame_weight=weight,
  )
  ours, metrics = loss(mixing)
  expected, expected_metrics = loss(frozen_first)
  np.testing.assert_allclose(ours, expected, rtol=1e-6)
  np.testing.assert_allclose(
    metrics.tangent_norm, expected_metrics.tangent_norm, rtol=1e-6
  )


def test_an_image_prefix_may_stand_still_in_discrete_consistency():
  x_0, noise, t = toy.batch()
  times = jnp.stack([t, 0.9 * t], axis=-1).at[:, 0].set(0)
  weight = jnp.ones((toy.B, toy.F)).at[:, 0].set(0)
  arguments = (toy.velocity, toy.PARAMS, toy.teacher, x_0, noise, times)
  loss, _ = losses.discrete_consistency_loss(*arguments, frame_weight=weight)
  assert jnp.isfinite(loss).all()
  with pytest.raises(ValueError, match="`times` must decrease"):
    losses.discrete_consistency_loss(*arguments)


def test_narrow_networks_have_wide_losses():
  x_0, noise, t = toy.batch()
  narrow = lambda p, x, t: toy.velocity(p, x, t).astype(jnp.bfloat16)
  for name in ("flow_matching", "discrete", "continuous"):
    loss, _ = toy.LOSSES[name](narrow, toy.PARAMS, toy.teacher, x_0, noise, t)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("name", toy.LOSSES)
def test_times_outside_the_unit_interval_are_refused(name):
  x_0, noise, t = toy.batch()
  with pytest.raises(ValueError, match=r"must hold .* in \[0,.* got values"):
    toy.LOSSES[name](
      toy.velocity, toy.PARAMS, toy.teacher, x_0, noise, 1000 * t
    )


@pytest.mark.parametrize("name", toy.LOSSES)
def test_times_of_another_shape_are_refused(name, unchecked):
  del unchecked
  x_0, noise, t = toy.batch()
  velocity = lambda p, x, t: x
  teacher = lambda x, t: x
  if name == "distribution_matching":
    with pytest.raises(ValueError, match="`t` must have a shape that begins"):
      losses.distribution_matching_loss(x_0, noise, t[:, :2], teacher, teacher)
    return
  with pytest.raises(ValueError, match=r"must have a shape that begins .*"):
    toy.LOSSES[name](velocity, toy.PARAMS, teacher, x_0, noise, t[:, :2])


def test_other_arguments_that_do_not_fit_are_refused(unchecked):
  del unchecked
  x_0, noise, t = toy.batch()
  common = (toy.velocity, toy.PARAMS)
  with pytest.raises(ValueError, match="`frame_weight` must hold one value"):
    losses.flow_matching_loss(*common, x_0, noise, t, frame_weight=t[:, 0])
  with pytest.raises(ValueError, match="`velocity` must return an array"):
    losses.flow_matching_loss(lambda *_: x_0[:, 0], {}, x_0, noise, t)
  with pytest.raises(ValueError, match="`teacher` must return an array"):
    losses.continuous_consistency_loss(
      *common, lambda x, t: x[:, 0], x_0, noise, t
    )
  with pytest.raises(ValueError, match="`reduction` must be"):
    losses.critic_loss(*common, x_0, noise, t, reduction="max")
  with pytest.raises(ValueError, match="`tangent_pass` must be"):
    losses.continuous_consistency_loss(
      *common, toy.teacher, x_0, noise, t, tangent_pass="none"
    )
  with pytest.raises(ValueError, match="`end_time` must not exceed"):
    losses.mean_flow_loss(
      toy.mean_velocity, toy.PARAMS, toy.teacher, x_0, noise, t / 2, t
    )
  with pytest.raises(ValueError, match="`times` must hold at least two"):
    losses.discrete_consistency_loss(
      *common, toy.teacher, x_0, noise, t[..., None]
    )


def test_values_are_not_checked_under_a_transformation():
  x_0, noise, t = toy.batch()
  loss = lambda t: losses.flow_matching_loss(
    toy.velocity, toy.PARAMS, x_0, noise, t
  )[0]
  assert jnp.isfinite(jax.jit(loss)(1000 * t)).all()
