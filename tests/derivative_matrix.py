"""A small network of two streams, and every derivative of it.

The derivatives that training takes, inside everything JAX does to a function,
and how many attention passes each of them may launch. `tests/kernels/
test_derivatives.py` runs each cell; `tools/write_derivatives.py` publishes the
counts in `docs/derivatives.md`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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

  def through(params, noisy, t, dn, dt):
    y, dy = tangent(params, noisy, t, dn, dt)
    return ((y - dy) ** 2).sum()

  def jvp_of_grad(params, noisy, t, dn, dt):
    grad = jax.grad(lambda p, *x: (net(p, *x) ** 2).sum())
    return jax.jvp(lambda *x: grad(params, *x), (noisy, t), (dn, dt))[1]

  return {
    "fwd": lambda p, noisy, t, dn, dt: net(p, noisy, t),
    "jvp": tangent,
    "grad": jax.grad(lambda p, noisy, t, *_: (net(p, noisy, t) ** 2).sum()),
    "shared": jax.grad(shared),
    "separate": jax.grad(separate),
    "through": jax.grad(through),
    "jvp of grad": jvp_of_grad,
  }


# Attention passes of one layer: {clean stream + noisy stream}.
FUSED = {
  "fwd": {"fwd": 2},
  "jvp": {"fwd": 1, "fused": 1},
  "grad": {"fwd": 2, "bwd": 2},
  "shared": {"fwd": 1, "fused": 1, "bwd": 2},
  "separate": {"fwd": 3, "fused": 1, "bwd": 2},
}
# A layer that is not kept runs forward once more.
FUSED_REMAT = FUSED | {
  "grad": {"fwd": 4, "bwd": 2},
  "shared": {"fwd": 3, "fused": 1, "bwd": 2},
  "separate": {"fwd": 5, "fused": 1, "bwd": 2},
}


def _unfused(counts):
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


CELLS = [
  (mode, transform)
  for mode in FUSED
  for transform in TRANSFORMS
  if mode not in ("fwd", "jvp")
  or transform not in ("save_attention", "shard_map+remat")
]


def promised(mode, transform, rule="fused"):
  """The attention passes that the design promises of a cell."""
  passes = TRANSFORMS[transform][1][mode]
  if rule == "unfused":
    passes = _unfused(passes)
  counts = {name: LAYERS * n for name, n in passes.items()}
  if mode == "separate" and transform in ("jit", "remat"):
    counts["fwd"] -= 1  # The tangent pass ends without clean output.
  return counts


def traced(mode, transform):
  """A cell, traced under the rule in force."""
  return jax.jit(build(ours, mode, transform)).trace(*inputs()[1])


MODES = {
  "fwd": "forward",
  "jvp": "jvp",
  "grad": "grad",
  "shared": "grad of a shared-primal jvp",
  "separate": "grad plus a separate jvp",
}
"""The published names of the modes."""

PASSES = {"fused": ("fwd", "fused", "bwd"), "unfused": ("fwd", "lin", "bwd")}
"""The passes that each rule launches."""


def table(counts):
  """The published matrix: one row a cell, one column a kind of pass.

  Args:
    counts: `counts(mode, transform, rule)`, the passes of a cell.
  """
  rows = [
    "| derivative | inside | fwd | fused | bwd | | fwd | lin | bwd |",
    "|---|---|--:|--:|--:|---|--:|--:|--:|",
  ]
  for mode, transform in CELLS:
    numbers = [
      [str(counts(mode, transform, rule).get(name, 0)) for name in names]
      for rule, names in PASSES.items()
    ]
    cells = [MODES[mode], f"`{transform}`", *numbers[0], "", *numbers[1]]
    rows.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
  return "\n".join(rows) + "\n"
