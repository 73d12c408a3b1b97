"""The non-finite policy, clause by clause, in values and in gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_losses as toy

from crcm_jax import losses

BAD = 1  # the example that goes wrong


@jax.custom_jvp
def hide(x, tangent):
  """Returns zero, whose tangent is as given."""
  del tangent
  return jnp.zeros_like(x)


@hide.defjvp
def _(primals, tangents):
  x, tangent = primals
  return jnp.zeros_like(x), tangent + 0 * tangents[0]


@functools.partial(jax.jit, static_argnames="name")
def run(
  name, params, x_0, noise, t, in_teacher, in_student, in_tangent, in_fake
):
  """Returns losses, metrics and gradients with poison added somewhere."""
  everywhere = lambda poison, x: jnp.broadcast_to(
    poison[:, None, None], x.shape
  )

  def student(p, x, t):
    hidden = hide(x, everywhere(in_tangent, x))
    return toy.velocity(p, x, t) + hidden + everywhere(in_student, x)

  def teacher(x, t):
    return toy.teacher(x, t) + everywhere(in_teacher, x)

  def fake(x, t):
    return toy.fake(x, t) + everywhere(in_fake, x)

  more = {"fake": fake} if name == "distribution_matching" else {}

  def total(p):
    per_example, metrics = toy.LOSSES[name](
      student, p, teacher, x_0, noise, t, **more
    )
    return per_example.sum(), (per_example, metrics)

  grads, (loss, metrics) = jax.grad(total, has_aux=True)(params)
  return loss, metrics, grads


def poison(value):
  return jnp.zeros(toy.B).at[BAD].set(value)


def clean_run(name, **changes):
  x_0, noise, t = toy.batch()
  arguments = {
    "x_0": x_0,
    "noise": noise,
    "t": t,
    "in_teacher": jnp.zeros(toy.B),
    "in_student": jnp.zeros(toy.B),
    "in_tangent": jnp.zeros(toy.B),
    "in_fake": jnp.zeros(toy.B),
  }
  return run(name, toy.PARAMS, **(arguments | changes))


def gradient_without_the_bad(name):
  """Returns the gradient of the good example alone, by removing the other."""
  x_0, noise, t = toy.batch()
  weight = jnp.ones((toy.B, toy.F)).at[BAD].set(0)

  def total(p):
    loss = toy.LOSSES[name](
      toy.velocity, p, toy.teacher, x_0, noise, t, frame_weight=weight
    )
    return loss[0].sum()

  return jax.jit(jax.grad(total))(toy.PARAMS)


def check_only_the_bad_is_lost(name, loss, metrics, grads):
  good, _, _ = clean_run(name)
  np.testing.assert_allclose(loss[0], good[0], rtol=1e-6)
  assert loss[BAD] == 0
  np.testing.assert_array_equal(metrics.dropped, [0, 1])
  np.testing.assert_array_equal(metrics.student_non_finite, [0, 0])
  assert all(jnp.isfinite(m).all() for m in metrics)
  expected = gradient_without_the_bad(name)
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", toy.LOSSES)
@pytest.mark.parametrize("argument", ["x_0", "noise", "t"])
@pytest.mark.parametrize("value", [jnp.nan, -jnp.inf])
def test_bad_data_costs_its_own_example(name, argument, value):
  if name == "distribution_matching" and argument == "x_0":
    pytest.skip("the sample is the student's own: see below")
  if name == "distribution_matching" and argument == "t":
    pytest.skip("the toy sample is made at t: it would be the student's own")
  data = dict(zip(("x_0", "noise", "t"), toy.batch(), strict=True))
  bad = {argument: data[argument].at[BAD, 0].set(value)}
  check_only_the_bad_is_lost(name, *clean_run(name, **bad))


@pytest.mark.parametrize("name", toy.WITH_TEACHER)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_teacher_costs_its_own_example(name, value):
  results = clean_run(name, in_teacher=poison(value))
  check_only_the_bad_is_lost(name, *results)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_fake_score_costs_its_own_example(value):
  results = clean_run("distribution_matching", in_fake=poison(value))
  check_only_the_bad_is_lost("distribution_matching", *results)


@pytest.mark.parametrize(
  "name", ["continuous", "mean_flow", "trigflow_continuous"]
)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_bad_tangent_costs_its_own_example(name, value):
  results = clean_run(name, in_tangent=poison(value))
  check_only_the_bad_is_lost(name, *results)


@pytest.mark.parametrize(
  "loss",
  [losses.discrete_consistency_loss, losses.trigflow_discrete_consistency_loss],
)
@pytest.mark.parametrize("where", ["target", "times"])
def test_a_bad_target_or_later_time_costs_its_own_example(loss, where):
  x_0, noise, t = toy.batch()
  later = t / 2
  extra = jnp.zeros(toy.B)
  if where == "target":
    extra = poison(jnp.nan)
  else:
    later = later.at[BAD, 1].set(jnp.nan)

  def total(p, extra, later, weight=None):
    target = lambda x, t: toy.teacher(x, t) + extra[:, None, None]
    times = jnp.stack([t, later], axis=-1)
    value, metrics = loss(
      *(toy.velocity, p, toy.teacher, x_0, noise, times),
      target=target,
      frame_weight=weight,
    )
    return value.sum(), (value, metrics)

  run = jax.jit(jax.grad(total, has_aux=True))
  grads, (value, metrics) = run(toy.PARAMS, extra, later)
  weight = jnp.ones((toy.B, toy.F)).at[BAD].set(0)
  want_grads, (want, _) = run(toy.PARAMS, jnp.zeros(toy.B), t / 2, weight)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_array_equal(metrics.dropped, [0, 1])
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, want_grads[key], rtol=1e-5)


def test_a_bad_end_time_costs_its_own_example():
  x_0, noise, t = toy.batch()

  def total(p, end_time, weight=None):
    value, metrics = losses.mean_flow_loss(
      *(toy.mean_velocity, p, toy.teacher, x_0, noise, t, end_time),
      frame_weight=weight,
    )
    return value.sum(), (value, metrics)

  run = jax.jit(jax.grad(total, has_aux=True))
  grads, (value, metrics) = run(toy.PARAMS, (t / 2).at[BAD, 0].set(jnp.nan))
  weight = jnp.ones((toy.B, toy.F)).at[BAD].set(0)
  want_grads, (want, _) = run(toy.PARAMS, t / 2, weight)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_array_equal(metrics.dropped, [0, 1])
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, want_grads[key], rtol=1e-5)


@pytest.mark.parametrize("name", toy.LOSSES)
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_born_in_the_student_shows(name, value):
  loss, metrics, grads = clean_run(name, in_student=poison(value))
  assert jnp.isfinite(loss[0])
  assert not jnp.isfinite(loss[BAD])
  np.testing.assert_array_equal(metrics.dropped, [0, 0])
  np.testing.assert_array_equal(metrics.student_non_finite, [0, 1])
  leaves = jax.tree.leaves(grads)
  assert not all(jnp.isfinite(leaf).all() for leaf in leaves)


def test_a_bad_teacher_does_not_hide_a_bad_student():
  loss, metrics, _ = clean_run(
    "continuous", in_teacher=poison(jnp.nan), in_student=poison(jnp.nan)
  )
  assert not jnp.isfinite(loss[BAD])
  np.testing.assert_array_equal(metrics.dropped, [0, 0])


def test_a_dropped_target_drops_every_part_of_the_replay():
  x_0, noise, t = toy.batch()
  poisoned = lambda x, t: toy.teacher(x, t) + poison(jnp.nan)[:, None, None]
  target, metrics = losses.distribution_matching_target(
    x_0, noise, t, poisoned, lambda x, t: 0 * x
  )
  np.testing.assert_array_equal(metrics.dropped, [0, 1])
  matching = lambda x, target: losses.target_matching_loss(x, target)
  for frame in range(toy.F):
    part = slice(frame, frame + 1)
    loss = matching(x_0[:, part], target[:, part])
    grad = jax.grad(lambda x, y: matching(x, y).sum())(
      x_0[:, part], target[:, part]
    )
    assert loss[0] > 0
    assert loss[BAD] == 0
    assert (grad[BAD] == 0).all()
    assert (grad[0] != 0).any()


def test_what_a_closure_holds_can_be_cleaned_too():
  context = jnp.ones((2, 3)).at[BAD, 1].set(jnp.inf)
  keep = losses.finite_examples({"context": context, "ids": jnp.arange(2)})
  np.testing.assert_array_equal(keep, [True, False])
  cleaned = losses.zero_examples({"context": context}, keep)
  np.testing.assert_array_equal(cleaned["context"], [[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("name", toy.LOSSES)
def test_metrics_hold_the_counts_and_the_norms(name):
  _, metrics, _ = clean_run(name)
  assert {"dropped", "student_non_finite"} <= set(metrics._fields)
  if name in ("continuous", "mean_flow", "trigflow_continuous"):
    assert {"tangent_norm", "teacher_gap", "normaliser"} <= set(metrics._fields)
    assert (metrics.tangent_norm > 0).all()
    assert (metrics.normaliser > 0.1).all()  # ||g|| + 0.1
  if name == "distribution_matching":
    assert (metrics.scale > 1e-5).all()
    assert (metrics.gradient_norm > 0).all()
