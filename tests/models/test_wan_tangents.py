"""The clean stream carries no tangent, and no work is spent on it."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_wan
from jax.extend import core

from crcm_jax import ChunkPattern, losses, models
from crcm_jax.losses import _tangents

MODEL = models.Wan(tiny_wan.CONFIG)
PATTERN = ChunkPattern(1, 1)
X, T, TEXT, CLEAN = tiny_wan.inputs(3)
PARAMS = tiny_wan.params()


def velocity(x, t, **mode):
  return MODEL.apply({"params": PARAMS}, x, t, TEXT, **mode)


def forced(x, t, **mode):
  return velocity(x, t, pattern=PATTERN, context=CLEAN, **mode)


def with_tangent(function):
  return lambda x, t: jax.jvp(function, (x, t), (x, t))


def equations(function, *args):
  """Every equation of the traced function, those of inner programs too."""

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      yield eqn
      for value in jax.tree.leaves(
        list(eqn.params.values()),
        is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr),
      ):
        if isinstance(value, core.ClosedJaxpr):
          yield from walk(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
          yield from walk(value)

  return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


def products(function, *args):
  return collections.Counter(
    eqn.primitive.name
    for eqn in equations(function, *args)
    if eqn.primitive.name == "dot_general"
    or eqn.primitive.name.startswith("attention_")
  )


@pytest.mark.parametrize("gradient", [True, False])
def test_tangents_cost_as_much_as_for_the_noisy_stream_alone(gradient):
  two = lambda x, t: forced(x, t, context_gradient=gradient)
  added = products(with_tangent(two), X, T)
  added.subtract(products(two, X, T))
  alone = products(with_tangent(velocity), X, T)
  alone.subtract(products(velocity, X, T))
  assert +added == +alone
  assert added["attention_fused"] == 2  # self and cross, of the noisy stream


def test_the_clean_stream_runs_forward_only():
  counts = products(with_tangent(forced), X, T)
  assert counts["attention_fwd"] == 2  # self and cross, of the clean stream
  own = [
    eqn.params["nonzero"]
    for eqn in equations(with_tangent(forced), X, T)
    if eqn.primitive.name == "attention_fused"
  ]
  # q, context k, v, own k, v: the context's tangents are zero.
  assert (True, False, False, True, True) in own


def test_a_tangent_of_zeros_is_paid_for():
  """The counts above can tell: a zero array is not a symbolic zero."""

  def moved(x, t, context):
    return velocity(x, t, pattern=PATTERN, context=context)

  def zeros(x, t):
    primals = (x, t, CLEAN)
    return jax.jvp(moved, primals, (x, t, jnp.zeros_like(CLEAN)))

  assert products(zeros, X, T)["attention_fused"] == 4


@pytest.mark.parametrize(
  ("dtype", "low", "high"), [("float32", 0, 5e-3), ("bfloat16", 1e-2, 0.15)]
)
def test_finite_differences_of_wan_err_as_documented(dtype, low, high):
  """At the default step, with features that turn by 1000 t as Wan's do."""
  config = dataclasses.replace(
    tiny_wan.CONFIG, time_scale=1000.0, freq_width=64, dtype=dtype
  )
  model, params = models.Wan(config), tiny_wan.params(config)
  v = lambda x, t: model.apply({"params": params}, x, t, TEXT)

  @tiny_wan.jit
  def both(x, t):
    point, direction = (x, t), (x, jnp.ones_like(t))
    step = losses.TANGENT_STEP
    difference = _tangents.central_difference(v, point, direction, step)
    return difference, jax.jvp(v, point, direction)[1]

  assert low <= tiny_wan.relative(*both(X, T)) < high


def test_stopped_context_is_never_run_backward():
  """With `context_gradient=False` no cotangent of the context is computed."""

  def backward(gradient):
    def loss(params):
      v = MODEL.apply(
        {"params": params},
        X,
        T,
        TEXT,
        pattern=PATTERN,
        context=CLEAN,
        context_gradient=gradient,
      )
      return jnp.sum(v**2)

    return products(jax.grad(loss), PARAMS)["attention_bwd"]

  assert backward(True) == 4
  assert backward(False) == 2
