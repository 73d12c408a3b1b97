"""Derivatives of attention inside everything JAX does to a function.

A small network of two streams, clean and noisy, is differentiated in every
mode under every transformation; values are compared with the same network on
the dense reference, and the attention passes that remain after dead code are
counted. This file needs JAX alone and also runs on the newest one.
"""

import functools

import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from crcm_jax import kernels
from crcm_jax.kernels import reference

LAYERS, B, S, N, D = 2, 2, 6, 2, 4
BOUNDARIES = (0, 2, 6)
CAUSAL = kernels.BlockMask.block_causal(BOUNDARIES)
NOISY = kernels.BlockMask.noisy_rows(BOUNDARIES)
stop = jax.lax.stop_gradient


def ours(q, k, v, context, mask):
  return kernels.attention(q, k, v, context=context, mask=mask)


def dense(q, k, v, context, mask):
  if context is not None:
    k, v = (jnp.concatenate(a, 1) for a in zip(context, (k, v), strict=True))
  visible = jnp.asarray(mask.dense())
  return reference.attention(q, k, v, visible, scale=D**-0.5)


def identity(f):
  return f


def sharded(f, check_vma=True):
  mesh = Mesh(np.array(jax.devices()[:1]), ("x",), (AxisType.Auto,))
  return jax.shard_map(
    f, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check_vma
  )


def network(
  attend, params, clean, noisy, t, *, remat=None, scan=True, wrap=identity
):
  """Two streams; the noisy one reads the clean one. Returns their sum."""

  def both(clean, noisy):
    context = clean[1:]
    return attend(*clean, None, CAUSAL), attend(*noisy, context, NOISY)

  def split(h, w):
    return tuple(x.reshape(*h.shape[:2], N, D) for x in jnp.split(h @ w, 3, -1))

  def layer(carry, w):
    clean, noisy = carry
    shifted = noisy * (1 + jnp.cos(t)[:, None, None])
    outs = wrap(both)(split(clean, w), split(shifted, w))
    return tuple(
      h + o.reshape(h.shape) for h, o in zip(carry, outs, strict=True)
    ), None

  if remat is not None:
    layer = jax.checkpoint(layer, policy=remat)
  if scan:
    return sum(jax.lax.scan(layer, (clean, noisy), params)[0])
  carry = (clean, noisy)
  for w in params:
    carry, _ = layer(carry, w)
  return sum(carry)


def modes(net):
  """The derivatives wanted of `net(params, noisy, t)`."""

  def tangent(params, noisy, t, dn, dt):
    return jax.jvp(lambda *x: net(params, *x), (noisy, t), (dn, dt))

  def shared(params, noisy, t, dn, dt):
    y, dy = tangent(params, noisy, t, dn, dt)
    return ((y - stop(dy)) ** 2).sum()

  def separate(params, noisy, t, dn, dt):
    dy = tangent(stop(params), noisy, t, dn, dt)[1]
    return ((net(params, noisy, t) - stop(dy)) ** 2).sum()

  return {
    "fwd": lambda p, noisy, t, dn, dt: net(p, noisy, t),
    "jvp": tangent,
    "grad": jax.grad(lambda p, noisy, t, *_: (net(p, noisy, t) ** 2).sum()),
    "shared": jax.grad(shared),
    "separate": jax.grad(separate),
  }


# Attention passes of one layer: {clean stream + noisy stream}.
FUSED = {
  "fwd": {"fwd": 2},
  "jvp": {"fwd": 1, "fused": 1},
  "grad": {"fwd": 2, "bwd": 2},
  "shared": {"fwd": 1, "fused": 1, "bwd": 2},
  "separate": {"fwd": 3, "fused": 1, "bwd": 2},
}
FUSED_REMAT = FUSED | {
  "grad": {"fwd": 4, "bwd": 2},
  "shared": {"fwd": 3, "fused": 1, "bwd": 2},
  "separate": {"fwd": 5, "fused": 1, "bwd": 2},
}


def unfused(counts):
  """The passes under the rule "unfused": each fused one is fwd and lin."""
  n = counts.get("fused", 0)
  if not n:
    return counts
  rest = {k: c for k, c in counts.items() if k != "fused"}
  return rest | {"fwd": rest.get("fwd", 0) + n, "lin": n}


TRANSFORMS = {
  "jit": (dict(scan=False), FUSED),
  "scan": (dict(), FUSED),
  "remat": (dict(scan=False, remat=lambda *_, **__: False), FUSED_REMAT),
  "scan+remat": (dict(remat=lambda *_, **__: False), FUSED_REMAT),
  "save_attention": (dict(remat=kernels.save_attention), FUSED),
  "vmap": (dict(), FUSED),
  "shard_map": (dict(wrap=sharded), FUSED),
  "shard_map+remat": (
    dict(
      wrap=functools.partial(sharded, check_vma=False),
      remat=lambda *_, **__: False,
    ),
    FUSED_REMAT,
  ),
}


@functools.cache
def inputs():
  keys = jax.random.split(jax.random.key(0), 5)
  draw = lambda key, *shape: jax.random.normal(key, shape)
  params = draw(keys[0], LAYERS, N * D, 3 * N * D) * 0.5 * (N * D) ** -0.5
  clean, noisy, dn = (draw(key, B, S, N * D) for key in keys[1:4])
  t = jnp.linspace(0.3, 0.7, B)
  return clean, (params, noisy, t, dn, jnp.ones(B))


def build(attend, mode, transform):
  """One cell of the matrix as a function of `inputs()[1]`."""
  clean, _ = inputs()
  options = TRANSFORMS[transform][0]

  def net(params, noisy, t):
    if transform != "vmap":
      return network(attend, params, clean, noisy, t, **options)
    one = lambda c, x, t: network(
      attend, params, c[None], x[None], t[None], **options
    )[0]
    return jax.vmap(one)(clean, noisy, t)

  return modes(net)[mode]


@functools.cache
def wanted(mode):
  return jax.jit(build(dense, mode, "scan"))(*inputs()[1])


CELLS = [
  (mode, transform)
  for mode in FUSED
  for transform in TRANSFORMS
  if mode not in ("fwd", "jvp")
  or transform not in ("save_attention", "shard_map+remat")
]


def _check(mode, transform, passes, run=True):
  """Checks the passes launched, then the values."""
  args = inputs()[1]
  traced = jax.jit(build(ours, mode, transform)).trace(*args)
  wanted_passes = {name: LAYERS * n for name, n in passes.items()}
  if mode == "separate" and transform in ("jit", "remat"):
    wanted_passes["fwd"] -= 1  # the tangent pass ends without clean output
  assert launches.attention(traced) == wanted_passes
  if run:
    _close(traced.lower().compile()(*args), wanted(mode))


def _close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize(("mode", "transform"), CELLS)
def test_matrix(mode, transform):
  """Right values at the cost that the design promises."""
  passes = TRANSFORMS[transform][1][mode]
  _check(mode, transform, passes, run=transform != "remat")


@pytest.mark.parametrize(("mode", "transform"), CELLS)
def test_matrix_unfused(monkeypatch, mode, transform):
  """The simpler rule, which needs the fewest of JAX's internals."""
  monkeypatch.setenv("CRCM_ATTENTION_RULE", "unfused")
  passes = unfused(TRANSFORMS[transform][1][mode])
  _check(mode, transform, passes, run=transform == "scan+remat")


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
