"""Losses where the answer is known: Gaussian data, and written-out sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_losses as toy

from crcm_jax import losses, paths
from crcm_jax.testing import GaussianTeacher

REAL = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
FAKE = GaussianTeacher([0.5, -1.0], [[0.7, 0.0], [0.0, 0.2]])


def draws(dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(1), 3)
  x_0 = REAL.sample(keys[0], 6).astype(dtype)
  noise = jax.random.normal(keys[1], (6, 2)).astype(dtype)
  t = jax.random.uniform(keys[2], (6,), minval=0.2, maxval=0.95).astype(dtype)
  return x_0, noise, t


def exact(params, x, t):
  """The consistency model of `REAL`; the parameter moves it off."""
  return REAL.consistency_velocity(x, t) + params


@pytest.mark.parametrize(
  ("loss", "time"),
  [
    (losses.continuous_consistency_loss, lambda t: t),
    (losses.trigflow_continuous_consistency_loss, paths.angle_from_time),
  ],
)
def test_the_tangent_target_vanishes_at_the_consistency_function(loss, time):
  with jax.enable_x64(True):
    x_0, noise, t = draws(jnp.float64)
    run = jax.jit(lambda p: loss(exact, p, REAL.velocity, x_0, noise, time(t)))
    at_exact, metrics = run(0.0)
    off, _ = run(0.1)
  np.testing.assert_allclose(at_exact, 0, atol=1e-20)
  np.testing.assert_allclose(metrics.normaliser, 0.1, rtol=1e-9)
  assert (np.asarray(off) > 1e-3).all()


def assert_regression_onto(g, loss, velocity):
  """Checks loss and gradient against equation (18), g being a constant.

  The loss is `(||g|| / (||g|| + c))^2`, its gradient `-2 g / (||g|| + c)`
  through the velocity.
  """
  norm = jnp.sqrt(jnp.square(g).sum((1, 2), keepdims=True))
  _, pull = jax.vjp(velocity, toy.PARAMS)
  (expected,) = pull(-2 * g / (norm + 0.1))
  value, grads = jax.value_and_grad(lambda p: loss(p).sum())(toy.PARAMS)
  np.testing.assert_allclose(
    value, jnp.square(norm / (norm + 0.1)).sum(), rtol=1e-5
  )
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected[key], rtol=1e-4)


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_the_warm_up_weighs_the_tangent_alone(warmup):
  x_0, noise, t = toy.batch()
  x_t = paths.interpolate(x_0, noise, t)
  v_teacher = toy.teacher(x_t, t)
  v, dv = jax.jvp(
    lambda x, t: toy.velocity(toy.PARAMS, x, t),
    (x_t, t),
    (v_teacher, jnp.ones_like(t)),
  )
  loss = lambda p: losses.continuous_consistency_loss(
    toy.velocity, p, toy.teacher, x_0, noise, t, tangent_weight=warmup
  )
  g = v_teacher - v - warmup * t[..., None] * dv
  assert_regression_onto(
    g, lambda p: loss(p)[0], lambda p: toy.velocity(p, x_t, t)
  )
  tangent_norm = jnp.sqrt(jnp.square(dv).sum((1, 2)))
  np.testing.assert_allclose(
    loss(toy.PARAMS)[1].tangent_norm, tangent_norm, rtol=1e-5
  )


@pytest.mark.parametrize("warmup", [0.0, 0.25, 1.0])
def test_the_trigflow_warm_up_weighs_x_and_the_root(warmup):
  x_0, noise, t = toy.batch()
  angle = paths.angle_from_time(t)
  x = paths.trigflow_interpolate(x_0, noise, angle)
  f_teacher = paths.trigflow_velocity(toy.teacher)(x, angle)
  sin, cos = jnp.sin(angle)[..., None], jnp.cos(angle)[..., None]

  def student(params):
    return paths.trigflow_velocity(lambda x, t: toy.velocity(params, x, t))

  f, df = jax.jvp(
    student(toy.PARAMS), (x, angle), (f_teacher, jnp.ones_like(angle))
  )
  root = jnp.sqrt(1 - warmup**2 * sin**2)
  g = -cos * root * (f - f_teacher) - cos * sin * (warmup * x + df)
  loss = lambda p: losses.trigflow_continuous_consistency_loss(
    toy.velocity, p, toy.teacher, x_0, noise, angle, tangent_weight=warmup
  )[0]
  assert_regression_onto(g, loss, lambda p: student(p)(x, angle))


def test_mean_flow_vanishes_at_the_flow_map():
  def average(params, x, t, end_time):
    jump = x - REAL.flow_map(x, t, end_time)
    return jump / (t - end_time)[:, None] + params

  with jax.enable_x64(True):
    x_0, noise, t = draws(jnp.float64)
    run = jax.jit(
      lambda p: losses.mean_flow_loss(
        average, p, REAL.velocity, x_0, noise, t, 0.3 * t
      )
    )
    np.testing.assert_allclose(run(0.0)[0], 0, atol=1e-18)
    assert (run(0.1)[0] > 0.1).all()


def test_mean_flow_to_time_zero_is_continuous_consistency():
  x_0, noise, t = toy.batch()
  mean_flow, metrics = losses.mean_flow_loss(
    toy.mean_velocity, toy.PARAMS, toy.teacher, x_0, noise, t, 0 * t
  )
  continuous, expected = losses.continuous_consistency_loss(
    toy.velocity, toy.PARAMS, toy.teacher, x_0, noise, t
  )
  np.testing.assert_allclose(mean_flow, continuous, rtol=1e-6)
  np.testing.assert_allclose(metrics.normaliser, expected.normaliser, rtol=1e-6)


def test_mean_flow_without_a_teacher_follows_the_draw():
  x_0, noise, t = toy.batch()
  arguments = (x_0, noise, t, t / 2)
  free = losses.mean_flow_loss(toy.mean_velocity, toy.PARAMS, None, *arguments)
  taught = losses.mean_flow_loss(
    toy.mean_velocity, toy.PARAMS, lambda x, t: noise - x_0, *arguments
  )
  np.testing.assert_array_equal(free[0], taught[0])


@pytest.mark.parametrize(
  ("loss", "time"),
  [
    (losses.discrete_consistency_loss, lambda t: t),
    (losses.trigflow_discrete_consistency_loss, paths.angle_from_time),
  ],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_discrete_consistency_is_of_the_order_of_its_teachers_steps(
  loss, time, steps
):
  """At the exact function: one Euler step errs by O(h^2), the loss squares."""
  with jax.enable_x64(True):
    x_0, noise, t = draws(jnp.float64)

    @jax.jit
    def value(h):
      times = time(t)[:, None] - h * jnp.arange(steps + 1.0)[None]
      return loss(exact, 0.0, REAL.velocity, x_0, noise, times)[0]

    slope = jnp.log2(value(0.02) / value(0.01))
  np.testing.assert_allclose(slope, 4, atol=0.35)


def test_discrete_consistency_tends_to_continuous():
  """P - Q is h g to first order, and P moves by -t dv."""
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(2), 2)
    x_0, noise = (jax.random.normal(k, (1, 2), jnp.float64) for k in keys)
    t, h = jnp.array([0.6]), 1e-6
    velocity = lambda p, x, t: jnp.sin(p["w"] * x) + p["b"] * t[:, None]
    params = {"w": jnp.array([[1.3, -0.4]]), "b": jnp.array([[0.2, 0.1]])}
    arguments = (REAL.velocity, x_0, noise)

    discrete = jax.grad(
      lambda p: losses.discrete_consistency_loss(
        velocity, p, *arguments, jnp.stack([t, t - h], axis=-1)
      )[0].sum()
    )(params)

    def continuous_loss(p):
      loss, metrics = losses.continuous_consistency_loss(
        velocity, p, *arguments, t
      )
      return loss.sum(), metrics

    continuous, metrics = jax.grad(continuous_loss, has_aux=True)(params)
    scale = (h * t * metrics.normaliser / x_0.size)[:, None]
    for key, grad in discrete.items():
      np.testing.assert_allclose(grad, scale * continuous[key], rtol=1e-4)


@pytest.mark.parametrize("name", ["discrete", "trigflow_discrete"])
def test_discrete_consistency_reduces_as_the_reference_does(name):
  """Rectified flow averages the features of a frame, TrigFlow sums them."""
  x_0, noise, t = toy.batch()
  loss, metrics = toy.LOSSES[name](
    toy.velocity, toy.PARAMS, toy.teacher, x_0, noise, t
  )
  count = toy.F if name == "discrete" else toy.F * toy.C
  np.testing.assert_allclose(loss, count * metrics.gap**2, rtol=1e-5)


def test_distribution_matching_divides_by_the_distance_from_the_real():
  x_0, noise, t = draws()
  _, metrics = losses.distribution_matching_target(
    x_0, noise, t, REAL.velocity, FAKE.velocity
  )
  x_t = paths.interpolate(x_0, noise, t)
  r = paths.data_prediction(x_t, REAL.velocity(x_t, t), t)
  np.testing.assert_allclose(metrics.scale, jnp.abs(x_0 - r).mean(1), rtol=1e-5)


def test_distribution_matching_descends_the_score_difference():
  x_0, noise, t = draws()
  matching = lambda x: losses.distribution_matching_loss(
    x, noise, t, REAL.velocity, FAKE.velocity
  )
  grad = jax.grad(lambda x: matching(x)[0].sum())(x_0)
  loss, metrics = matching(x_0)
  x_t = paths.interpolate(x_0, noise, t)
  scores = FAKE.score(x_t, t) - REAL.score(x_t, t)
  expected = (t**2 / (1 - t) / metrics.scale)[:, None] * scores
  np.testing.assert_allclose(grad, 2 * expected, rtol=2e-3, atol=1e-4)
  np.testing.assert_allclose(loss, metrics.gradient_norm**2, rtol=1e-4)


def test_distribution_matching_is_zero_between_equal_scores():
  x_0, noise, t = draws()
  loss, _ = losses.distribution_matching_loss(
    x_0, noise, t, REAL.velocity, REAL.velocity
  )
  np.testing.assert_allclose(loss, 0, atol=1e-12)


def test_the_replay_has_the_gradient_of_the_direct_form():
  x_0, noise, t = toy.batch()
  real, fake = toy.teacher, lambda x, t: 0 * x
  sample = lambda p: x_0 - toy.velocity(p, x_0, t)
  direct = jax.grad(
    lambda p: losses.distribution_matching_loss(
      sample(p), noise, t, real, fake
    )[0].sum()
  )(toy.PARAMS)
  target, _ = losses.distribution_matching_target(
    sample(toy.PARAMS), noise, t, real, fake
  )

  def replay(p):
    parts = [
      losses.target_matching_loss(sample(p)[:, f : f + 1], target[:, f : f + 1])
      for f in range(toy.F)
    ]
    return sum(parts).sum()

  replayed = jax.grad(replay)(toy.PARAMS)
  for key in direct:
    np.testing.assert_allclose(replayed[key], direct[key], rtol=1e-5)


def test_flow_matching_sums_frames_and_averages_features():
  x_0, noise, t = toy.batch()
  weight = losses.gaussian_bell_weight(t)
  loss, metrics = losses.flow_matching_loss(
    toy.velocity, toy.PARAMS, x_0, noise, t, weight=weight
  )
  x_t = paths.interpolate(x_0, noise, t)
  error = toy.velocity(toy.PARAMS, x_t, t) - (noise - x_0)
  np.testing.assert_allclose(
    loss, (weight * (error**2).mean(-1)).sum(1), rtol=1e-5
  )
  np.testing.assert_allclose(metrics.error, (error**2).mean((1, 2)), rtol=1e-5)


def test_the_bell_weighs_the_middle_of_time():
  t = jnp.array([0.0, 0.5, 1.0])
  weight = losses.gaussian_bell_weight(t)
  np.testing.assert_allclose(weight, [0, 1 - np.exp(-0.5), 0], atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_critic_reduces_everything(reduction):
  x_0, noise, t = toy.batch()
  weight = 1 / (1 + t)
  loss, _ = losses.critic_loss(
    toy.velocity,
    toy.PARAMS,
    x_0,
    noise,
    t,
    weight=weight,
    reduction=reduction,
  )
  x_t = paths.interpolate(x_0, noise, t)
  error = toy.velocity(toy.PARAMS, x_t, t) - (noise - x_0)
  expected = getattr(weight[..., None] * error**2, reduction)((1, 2))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_the_critic_averages_unless_told_otherwise():
  arguments = (toy.velocity, toy.PARAMS, *toy.batch())
  loss, metrics = losses.critic_loss(*arguments)
  np.testing.assert_array_equal(loss, metrics.error)


def test_the_critic_does_not_move_the_samples():
  x_0, noise, t = toy.batch()
  grad = jax.grad(
    lambda x: losses.critic_loss(toy.velocity, toy.PARAMS, x, noise, t)[0].sum()
  )(x_0)
  np.testing.assert_array_equal(grad, 0)


def test_regression_is_zero_at_the_flow_map():
  x_0, noise, t = draws()
  x_t = paths.interpolate(x_0, noise, t)
  end = REAL.consistency_function(x_t, t)
  loss, _ = losses.regression_loss(exact, 0.0, x_t, end, t)
  np.testing.assert_allclose(loss, 0, atol=1e-10)
  off, _ = losses.regression_loss(exact, 1.0, x_t, end, t)
  np.testing.assert_allclose(off, t**2, rtol=1e-4)
