"""Derivatives of attention inside everything JAX does to a function.

A small network of two streams, clean and noisy, is differentiated in every
mode under every transformation (`derivative_matrix.py`); values are compared
with the same network on the dense reference, and the attention passes that
remain after dead code are counted. This file needs JAX alone and also runs on
the newest one.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
from derivative_matrix import (
  B,
  build,
  CELLS,
  D,
  dense,
  inputs,
  LAYERS,
  N,
  NOISY,
  ours,
  promised,
  S,
  table,
  traced,
)

from crcm_jax import kernels

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs" / "derivatives.md"


@functools.cache
def wanted(mode):
  return jax.jit(build(dense, mode, "scan"))(*inputs()[1])


def _check(mode, transform, rule="fused", run=True):
  """Checks the passes launched, then the values."""
  cell = traced(mode, transform)
  assert launches.attention(cell) == promised(mode, transform, rule)
  if run:
    _close(cell.lower().compile()(*inputs()[1]), wanted(mode))


def _close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("mode", "transform"), CELLS)
def test_matrix(mode, transform):
  """Right values at the cost that the design promises."""
  _check(mode, transform)


@pytest.mark.parametrize(("mode", "transform"), CELLS)
def test_matrix_unfused(monkeypatch, mode, transform):
  """The simpler rule, which needs the fewest of JAX's internals."""
  monkeypatch.setenv("CRCM_ATTENTION_RULE", "unfused")
  _check(mode, transform, "unfused", run=transform == "scan+remat")


def test_the_published_matrix_is_this_one():
  """The cells above are promised; `tools/write_derivatives.py` measured."""
  assert table(promised) in DOCS.read_text(), (
    "docs/derivatives.md is out of date; run `python tools/write_derivatives.py"
    "`."
  )


SECOND = [
  pytest.param(mode, transform, marks=() if cheap else pytest.mark.slow)
  for mode in ("through", "jvp of grad")
  for transform, cheap in {
    "jit": False,
    "scan": False,
    "remat": False,
    "scan+remat": True,
    "vmap": False,
    "shard_map": True,
  }.items()
]


@pytest.mark.parametrize(("mode", "transform"), SECOND)
def test_second_order_composes(mode, transform):
  """Gradients through the tangent, and tangents of the gradient."""
  cell = traced(mode, transform)
  _close(cell.lower().compile()(*inputs()[1]), wanted(mode))


@pytest.mark.parametrize("rule", ["fused", "unfused"])
def test_second_order(monkeypatch, rule):
  """Gradients through a tangent, jvp of grad and grad of grad."""
  monkeypatch.setenv("CRCM_ATTENTION_RULE", rule)
  keys = jax.random.split(jax.random.key(1), 10)
  x, t = (
    [jax.random.normal(key, (B, S, N, D)) for key in part]
    for part in (keys[:5], keys[5:])
  )

  def derivatives(attend):
    call = lambda q, k, v, *context: attend(q, k, v, context, NOISY)

    def through_tangent(*x):
      live = lambda q, k, v: call(q, k, v, *x[3:])
      return (jax.jvp(live, x[:3], tuple(t[:3]))[1] ** 2).sum()

    grad = jax.grad(lambda *x: (call(*x) ** 3).sum(), argnums=(0, 1, 4))
    return (
      jax.grad(through_tangent, argnums=tuple(range(5)))(*x),
      jax.jvp(grad, tuple(x), tuple(t)),
      jax.grad(lambda q: (grad(q, *x[1:])[0] ** 2).sum())(x[0]),
    )

  got, want = (
    jax.tree.leaves(jax.jit(lambda f=f: derivatives(f))())
    for f in (ours, dense)
  )
  _close(got, want)


def test_stopped_tangent_needs_no_dense_work():
  """No products but projections remain beside the attention passes."""
  args = inputs()[1]
  plain = launches.count(jax.jit(build(ours, "grad", "scan")).trace(*args))
  shared = launches.count(jax.jit(build(ours, "shared", "scan")).trace(*args))
  # One more projection a layer: that of the noisy stream's tangent.
  assert shared["dot_general"] == plain["dot_general"] + LAYERS


PRODUCTS = {  # active operands: (fused, linear, backward)
  "q": (4, 3, 3),
  "k": (4, 3, 3),
  "v": (3, 2, 2),
  "qkv": (6, 5, 5),
  "": (2, 0, 0),
}


@pytest.mark.parametrize("active", PRODUCTS)
def test_products_of_each_pass(active):
  """Zero tangents and unwanted cotangents cost no products."""
  x = dict.fromkeys("qkv", jnp.ones((1, 4, 2, 8)))
  live = {name: x[name] for name in active}

  def attend(live):
    return kernels.attention(**(x | live))

  def products(f, *args):
    """dot_generals of the passes that f launches, by pass."""
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
    dots = {}
    for eqn in jaxpr.eqns:
      if eqn.primitive.name.startswith("attention_"):
        run = functools.partial(eqn.primitive.impl, **eqn.params)
        shapes = [
          jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars
        ]
        name = eqn.primitive.name.removeprefix("attention_")
        traced = jax.jit(run).trace(*shapes)
        dots[name] = launches.count(traced)["dot_general"]
    return dots

  fused, linear, backward = PRODUCTS[active]
  tangent = lambda live: jax.jvp(attend, (live,), (live,))
  if not active:
    assert products(tangent, live) == {"fwd": 2}
    return
  assert products(tangent, live) == {"fused": fused}
  both = lambda live: jax.vjp(attend, live)[1](x["q"])
  assert products(both, live) == {"fwd": 2, "bwd": backward}
  push = lambda live: jax.linearize(attend, live)[1](live)
  assert products(push, live)["lin"] == linear


def test_eager_calls_work_without_jit():
  args = inputs()[1]
  for mode in ("jvp", "shared"):
    _close(build(ours, mode, "scan")(*args), wanted(mode))
