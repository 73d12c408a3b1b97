"""Ways to compute a tangent: equal numbers, stated biases, helpful errors."""

import functools

import derivative_matrix as matrix
import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
import toy_losses as toy
from jax import custom_derivatives
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from quick_jit import quick_jit

from crcm_jax import losses
from crcm_jax.losses import _tangents

CONTINUOUS = ["continuous", "mean_flow", "trigflow_continuous"]


def total(name, params, velocity=toy.velocity, **settings):
  """A loss as a function of the parameters alone."""
  x_0, noise, t = toy.batch()
  loss, _ = toy.LOSSES[name](
    velocity, params, toy.teacher, x_0, noise, t, **settings
  )
  return loss.sum()


def value_and_grad(name, **settings):
  run = functools.partial(total, name, **settings)
  return quick_jit(jax.value_and_grad(run))(toy.PARAMS)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_separate_pass_gives_the_same_numbers(name):
  shared = value_and_grad(name, tangent_pass="shared")
  separate = value_and_grad(name, tangent_pass="separate")
  same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
  jax.tree.map(same, shared, separate)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_finite_differences_come_close(name):
  shared = value_and_grad(name, tangent_pass="shared")
  differences = value_and_grad(name, tangent_pass="finite_difference")
  close = functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=5e-3)
  jax.tree.map(close, differences, shared)


def test_the_bias_of_finite_differences_is_of_second_order():
  """It is h^2 / 6 times the third derivative along the line."""
  with jax.enable_x64(True):
    x, _, t = jax.tree.map(lambda a: a.astype(jnp.float64), toy.batch())
    point, direction = (x, t), (jnp.cos(x), jnp.ones_like(t))
    velocity = lambda x, t: jnp.sin(2 * x) * jnp.cos(3 * t)[..., None]

    def along(f):
      return lambda x, t: jax.jvp(f, (x, t), direction)[1]

    third = along(along(along(velocity)))(*point)
    exact = along(velocity)(*point)
    for h in (1e-2, 1e-3):
      got = _tangents.central_difference(velocity, point, direction, h)
      np.testing.assert_allclose(
        (got - exact) / h**2, third / 6, rtol=1e-3, atol=20 * h**2
      )


@pytest.mark.parametrize("name", CONTINUOUS)
def test_losses_reach_the_jvp_as_the_step_falls(name):
  with jax.enable_x64(True):
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float64), tree)
    x_0, noise, t = wide(toy.batch())

    def gradient(params, **settings):
      loss = lambda p: toy.LOSSES[name](
        toy.velocity, p, toy.teacher, x_0, noise, t, **settings
      )[0].sum()
      return ravel_pytree(quick_jit(jax.grad(loss))(params))[0]

    params = wide(toy.PARAMS)
    exact = gradient(params)
    at_step = functools.partial(
      gradient, params, tangent_pass="finite_difference"
    )
    coarse, fine = (
      jnp.linalg.norm(at_step(tangent_step=h) - exact) for h in (1e-2, 1e-3)
    )
    slope = np.log10(float(coarse / fine))
    assert float(fine) < 1e-4
  np.testing.assert_allclose(slope, 2, atol=0.05)


PASSES = {  # of the attention of two layers and two streams
  "shared": matrix.promised("shared", "scan"),
  "separate": matrix.promised("separate", "scan"),
  "finite_difference": {"fwd": 3 * 4, "bwd": 4},
}


@pytest.mark.parametrize("tangent_pass", PASSES)
def test_losses_launch_what_the_published_matrix_says(tangent_pass):
  """Looking for an error that has a cure runs nothing."""
  clean, (params, noise, t, *_) = matrix.inputs()
  velocity = lambda p, x, t: matrix.network(matrix.ours, p, clean, x, t)
  loss = lambda p: losses.continuous_consistency_loss(
    velocity, p, lambda x, t: x, clean, noise, t, tangent_pass=tangent_pass
  )[0].sum()
  traced = jax.jit(jax.grad(loss)).trace(params)
  assert launches.attention(traced) == PASSES[tangent_pass]


# --- Networks whose "attention" JAX cannot differentiate as asked ---


@jax.custom_vjp
def no_forward_mode(x):
  """Like FlashAttention kernels: forward, and a backward kernel."""
  return jnp.tanh(x)


no_forward_mode.defvjp(
  lambda x: (jnp.tanh(x), x),
  lambda x, g: (g * (1 - jnp.tanh(x) ** 2),),
)


@jax.custom_jvp
def no_gradient_through_jvp(x):
  """Its tangent is a linear kernel with a transpose and nothing more."""
  return jnp.tanh(x)


@no_gradient_through_jvp.defjvp
def _tangent(primals, tangents):
  slope = lambda x, d: (1 - jnp.tanh(x) ** 2) * d
  push = custom_derivatives.linear_call(slope, slope, *primals, *tangents)
  return no_gradient_through_jvp(*primals), push


def network(attend, params, x, t, scan=False):
  h = params["w"] * x + params["b"] * t[..., None]
  if not scan:
    return attend(h)
  layer = jax.checkpoint(lambda h, _: (attend(h), None))
  return jax.lax.scan(layer, h, None, length=2)[0]


def run(attend, transform, name="continuous", scan=False, **settings):
  """Runs a loss of a network under a transformation."""
  velocity = functools.partial(network, attend, scan=scan)
  loss = lambda p: total(name, p, velocity, **settings)
  return transform(loss)(toy.PARAMS)


def sharded(f):
  mesh = Mesh(np.array(jax.devices()[:1]), ("x",), (AxisType.Auto,))
  return jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P())


def _stacked(params):
  return jax.tree.map(lambda a: jnp.stack([a, a]), params)


TRANSFORMS = {
  "eager": lambda f: f,
  "jit": quick_jit,
  "grad": jax.grad,
  "jit(grad)": lambda f: quick_jit(jax.grad(f)),
  "eval_shape": lambda f: functools.partial(jax.eval_shape, jax.grad(f)),
  "vmap": lambda f: lambda p: quick_jit(jax.vmap(jax.grad(f)))(_stacked(p)),
  "shard_map": lambda f: quick_jit(sharded(jax.grad(f))),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("tangent_pass", ["shared", "separate"])
@pytest.mark.parametrize("scan", [False, True])
def test_attention_without_forward_mode_names_the_cure(
  transform, tangent_pass, scan
):
  message = (
    rf'`velocity` must allow `jax.jvp` with `tangent_pass="{tangent_pass}"`.*'
    r"`jax.custom_vjp`.*`crcm_jax.kernels.attention`.*finite_difference"
  )
  with pytest.raises(NotImplementedError, match=message):
    run(
      no_forward_mode,
      TRANSFORMS[transform],
      scan=scan,
      tangent_pass=tangent_pass,
    )


@pytest.mark.parametrize("name", CONTINUOUS)
def test_every_continuous_loss_names_the_cure(name):
  with pytest.raises(NotImplementedError, match="finite_difference"):
    run(no_forward_mode, TRANSFORMS["jit(grad)"], name)


@pytest.mark.parametrize("transform", [t for t in TRANSFORMS if t != "jit"])
def test_attention_without_gradient_through_its_jvp_names_the_cure(transform):
  if transform == "eager":
    run(no_gradient_through_jvp, TRANSFORMS[transform])  # no gradient: fine
    return
  message = r'gradient through its jvp.*Use `tangent_pass="separate"`'
  with pytest.raises(NotImplementedError, match=message):
    run(no_gradient_through_jvp, TRANSFORMS[transform])


@pytest.mark.parametrize("scan", [False, True])
def test_the_cures_cure(scan):
  """The same gradients as with an attention that allows everything."""
  jit_grad = TRANSFORMS["jit(grad)"]
  want = run(jnp.tanh, jit_grad, scan=scan)
  apart = run(
    no_gradient_through_jvp, jit_grad, scan=scan, tangent_pass="separate"
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4), apart, want
  )
  differences = run(
    no_forward_mode, jit_grad, scan=scan, tangent_pass="finite_difference"
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=5e-3, atol=1e-3),
    differences,
    want,
  )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_attention_that_allows_everything_works(transform):
  run(jnp.tanh, TRANSFORMS[transform])


@pytest.mark.parametrize("scan", [False, True])
def test_a_custom_vjp_whose_tangent_is_stopped_works_apart(scan):
  """Its tangent is dead code; only a gradient through the jvp meets it."""
  attend = lambda h: jnp.tanh(h) + jax.lax.stop_gradient(no_forward_mode(h))
  apart = functools.partial(run, attend, scan=scan, tangent_pass="separate")
  for transform in ("jit", "jit(grad)", "eval_shape"):
    apart(TRANSFORMS[transform])
  run(attend, TRANSFORMS["jit"], scan=scan)
  with pytest.raises(NotImplementedError, match=r'Use `tangent_pass="separate'):
    run(attend, TRANSFORMS["jit(grad)"], scan=scan)


@pytest.mark.parametrize("jit", [False, True])
def test_an_error_of_the_network_itself_stays_what_it_is(jit):
  def broken(x):
    raise ZeroDivisionError("mine")

  with pytest.raises(ZeroDivisionError, match="mine"):
    run(broken, TRANSFORMS["jit(grad)" if jit else "eager"])


def test_a_step_must_be_positive():
  with pytest.raises(ValueError, match=r"`tangent_step` must be positive; got"):
    total(
      "continuous",
      toy.PARAMS,
      tangent_pass="finite_difference",
      tangent_step=0.0,
    )
