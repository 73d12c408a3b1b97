"""Attention as one differentiable operation, whatever computes it.

Four primitives, the passes of `backend`, and their rules:

    fwd    -> (o, lse)              jvp: fused (the rule "unfused": fwd, lin)
    fused  -> (o, lse, to)          splits into fwd (known) and lin (unknown)
    lin    -> to, linear in its tangents; its transpose is bwd
    bwd    -> the wanted cotangents

So jax.jvp runs fused; jax.grad runs fwd and bwd; the gradient of a jvp whose
tangent is stopped shares its primal: fused, bwd. Zero tangents are no operands.
Derivatives of a tangent or cotangent are those of the dense reference: right,
quadratic in memory, and dead code, hence free, where the tangent is stopped.
`lse` is a residual, never a result: its tangent is declared zero.
"""

from functools import partial

import jax
import jax.numpy as jnp

from crcm_jax.kernels import second_order
from crcm_jax.kernels._compat import (
  ad,
  batching,
  mlir,
  partial_eval_rules,
  Primitive,
  remat_rules,
  set_dce_rule,
  with_axes,
  zero_tangent,
)
from crcm_jax.kernels.backend import given, Problem, spread, sum_dtype


def bind(problem: Problem, *operands):
  """Computes attention of flat operands (q, k, v, ..., ranges, tables...)."""
  return fwd_p.bind(*operands, problem=problem)[0]


def save_attention(prim, *_, **__) -> bool:
  """Keeps what attention computed: a `policy` for `jax.checkpoint`."""
  return prim in (fwd_p, fused_p)


# --- The primitives ---


def _fwd(*flat, problem):
  return list(problem.backend.forward(problem, problem.operands(flat)))


def _fused(*flat, problem, nonzero):
  n = len(flat) - sum(nonzero)
  x, t = problem.operands(flat[:n]), problem.tangents(flat[n:], nonzero)
  return list(problem.backend.fused(problem, x, t))


def _lin(*flat, problem, nonzero):
  n = len(flat) - sum(nonzero)
  *x, o, lse = flat[:n]
  t = problem.tangents(flat[n:], nonzero)
  return [problem.backend.linear(problem, problem.operands(x), o, lse, t)]


def _bwd(*flat, problem, wanted):
  *x, o, lse, do = flat
  return problem.backward(x, o, lse, do, wanted)


def _o(q):
  return q.update(weak_type=False)


def _lse(q):  # [b n s]
  return with_axes(q, (0, 2, 1), sum_dtype(q.dtype))


def _outputs(*likes):
  return lambda q, *_, **__: [like(q) for like in likes]


def _wanted_outputs(*avals, wanted, **_):
  return [_o(a) for a, w in zip(avals, wanted, strict=False) if w]


def _batch(prim, args, dims, **params):
  """Folds a mapped axis into the batch; mapped ranges run one by one."""
  mapped = [d is not None for d in dims]
  ints = [jnp.issubdtype(a.dtype, jnp.integer) for a in args]
  args = [
    jnp.moveaxis(a, d, 0) if m else a
    for a, d, m in zip(args, dims, mapped, strict=True)
  ]
  moving = [a for a, m in zip(args, mapped, strict=True) if m]
  size = len(moving[0])

  def one(xs):
    xs = spread(xs, mapped)
    full = [a if x is None else x for a, x in zip(args, xs, strict=True)]
    return prim.bind(*full, **params)

  def fold(a, is_mapped, is_int):
    if is_int:
      return a
    a = a if is_mapped else jnp.broadcast_to(a[None], (size, *a.shape))
    return a.reshape(-1, *a.shape[2:])

  if any(m and i for m, i in zip(mapped, ints, strict=True)):
    outs = jax.lax.map(one, moving)
  else:
    outs = prim.bind(*map(fold, args, mapped, ints), **params)
    outs = [o.reshape(size, -1, *o.shape[1:]) for o in outs]
  return outs, [0] * len(outs)


def _primitive(name, run, out_avals, *static):
  prim = Primitive("attention_" + name)
  prim.multiple_results = True
  prim.def_impl(jax.jit(run, static_argnames=("problem", *static)))
  prim.def_abstract_eval(out_avals)
  mlir.register_lowering(prim, mlir.lower_fun(run, multiple_results=True))
  batching.primitive_batchers[prim] = partial(_batch, prim)
  return prim


fwd_p = _primitive("fwd", _fwd, _outputs(_o, _lse))
fused_p = _primitive("fused", _fused, _outputs(_o, _lse, _o), "nonzero")
lin_p = _primitive("lin", _lin, _outputs(_o), "nonzero")
bwd_p = _primitive("bwd", _bwd, _wanted_outputs, "wanted")


# --- Tangents; below, a list of tangents has None for each that is zero ---


def _nones(tangents):
  return [None if type(t) is ad.Zero else t for t in tangents]


def _sum(*terms):
  terms = [t for t in terms if t is not None]
  return sum(terms[1:], terms[0]) if terms else None


def _or_zero(tangent, primal):
  return zero_tangent(primal) if tangent is None else tangent


def _linear(problem, x, o, lse, tangents):
  """Output tangent along `tangents`, or None."""
  live, nonzero = given(tangents)
  if not live:
    return None
  return lin_p.bind(*x, o, lse, *live, problem=problem, nonzero=nonzero)[0]


def _fwd_jvp(x, tangents, *, problem):
  tangents = _nones(tangents[: problem.num_floats])
  live, nonzero = given(tangents)
  if live and problem.fused:
    o, lse, to = fused_p.bind(*x, *live, problem=problem, nonzero=nonzero)
  else:
    o, lse = fwd_p.bind(*x, problem=problem)
    to = _linear(problem, x, o, lse, tangents)
  return [o, lse], [_or_zero(to, o), zero_tangent(lse)]


def _tangent_of_tangent(problem, x, o, lse, t, dt, dx):
  along_x = second_order.tangent(problem, x, t, dx)
  return _sum(_linear(problem, x, o, lse, dt), along_x)


def _fused_jvp(args, dargs, *, problem, nonzero):
  n = len(args) - sum(nonzero)
  x, t = args[:n], spread(args[n:], nonzero)
  dx = _nones(dargs[: problem.num_floats])
  dt = spread(_nones(dargs[n:]), nonzero)
  o, lse, to = fused_p.bind(*args, problem=problem, nonzero=nonzero)
  do = _linear(problem, x, o, lse, dx)
  dto = _tangent_of_tangent(problem, x, o, lse, t, dt, dx)
  return [o, lse, to], [_or_zero(do, o), zero_tangent(lse), _or_zero(dto, to)]


def _lin_jvp(args, dargs, *, problem, nonzero):
  n = len(args) - sum(nonzero)
  *x, o, lse = args[:n]
  t, dt = (spread(a, nonzero) for a in (args[n:], _nones(dargs[n:])))
  dx = _nones(dargs[: problem.num_floats])
  (to,) = lin_p.bind(*args, problem=problem, nonzero=nonzero)
  dto = _tangent_of_tangent(problem, x, o, lse, t, dt, dx)
  return [to], [_or_zero(dto, to)]


def _bwd_jvp(args, dargs, *, problem, wanted):
  *x, o, lse, do = args
  dx, ddo = _nones(dargs[: problem.num_floats]), *_nones(dargs[-1:])
  grads = bwd_p.bind(*args, problem=problem, wanted=wanted)
  if any(d is not None for d in dx):
    dgrads = second_order.cotangents(problem, x, do, dx, ddo, wanted)
  elif ddo is not None:
    dgrads = bwd_p.bind(*x, o, lse, ddo, problem=problem, wanted=wanted)
  else:
    dgrads = map(zero_tangent, grads)
  return grads, list(dgrads)


ad.primitive_jvps.update(
  {fwd_p: _fwd_jvp, fused_p: _fused_jvp, lin_p: _lin_jvp, bwd_p: _bwd_jvp}
)

# --- Transposes: bwd is the transpose of lin, and lin that of bwd ---


def _lin_transpose(cts, *args, problem, nonzero):
  n = len(args) - sum(nonzero)
  (do,) = cts
  asked = [ad.is_undefined_primal(t) for t in args[n:]]
  if type(do) is ad.Zero or not any(asked):
    return [None] * len(args)
  wanted = tuple(bool(a) for a in spread(asked, nonzero))
  grads = bwd_p.bind(*args[:n], do, problem=problem, wanted=wanted)
  return [None] * n + spread(grads, asked)


def _bwd_transpose(cts, *args, problem, wanted):
  tangents = spread(_nones(cts), wanted)
  *x, o, lse = args[:-1]
  return [None] * len(args[:-1]) + [_linear(problem, x, o, lse, tangents)]


ad.primitive_transposes.update({lin_p: _lin_transpose, bwd_p: _bwd_transpose})

# --- Partial evaluation, remat and dead code: fused = fwd, then lin ---


def _fused_partial_eval(trace, *tracers, problem, nonzero):
  n = len(tracers) - sum(nonzero)
  params = dict(problem=problem, nonzero=nonzero)
  known = [t.is_known() for t in tracers]
  if not all(known[:n]) or all(known[n:]):
    return trace.default_process_primitive(fused_p, tracers, params)
  x = [t.pval.get_known() for t in tracers[:n]]
  o, lse = fwd_p.bind(*x, problem=problem)
  args = [*x, o, lse, *tracers[n:]]
  (to,) = trace.default_process_primitive(lin_p, args, params)
  return [o, lse, to]


def _without_tangent(eqn):
  n = len(eqn.invars) - sum(eqn.params["nonzero"])
  changes = dict(invars=eqn.invars[:n], outvars=eqn.outvars[:2])
  changes["params"] = dict(problem=eqn.params["problem"])
  return eqn.replace(primitive=fwd_p, **changes)


def _fused_remat(saveable, unknown, instantiated, eqn):
  """Returns the known and the recomputed equation, and their residuals."""
  n = len(eqn.invars) - sum(eqn.params["nonzero"])
  known_in = [v for v, i in zip(eqn.invars, instantiated, strict=True) if not i]
  residuals = [v for v in known_in if not hasattr(v, "val")]  # no literals
  avals = [v.aval for v in eqn.invars]
  yes, no = [True] * 3, [False] * 3
  if any(unknown[:n]):
    return None, eqn, yes, yes, residuals
  if not any(unknown):
    if saveable(fused_p, *avals, **eqn.params) is True:
      return eqn, None, no, no, []
    return eqn, eqn, no, yes, residuals
  known = _without_tangent(eqn)
  unknown_out = [False, False, True]
  if saveable(fwd_p, *avals[:n], **known.params) is not True:
    return known, eqn, unknown_out, yes, residuals
  o, lse, to = eqn.outvars
  invars = [*eqn.invars[:n], o, lse, *eqn.invars[n:]]
  linear = eqn.replace(primitive=lin_p, invars=invars, outvars=[to])
  return known, linear, unknown_out, unknown_out, [*residuals, o, lse]


def _fused_dce(used, eqn):
  n, total = len(eqn.invars) - sum(eqn.params["nonzero"]), len(eqn.invars)
  if used[2] or not any(used):
    return [used[2]] * total, eqn if used[2] else None
  return [True] * n + [False] * (total - n), _without_tangent(eqn)


def _bwd_dce(used, eqn):
  if not any(used):
    return [False] * len(eqn.invars), None
  flags = spread(used, eqn.params["wanted"])
  outvars = [v for v, u in zip(eqn.outvars, used, strict=True) if u]
  params = dict(eqn.params, wanted=tuple(bool(f) for f in flags))
  return [True] * len(eqn.invars), eqn.replace(outvars=outvars, params=params)


partial_eval_rules[fused_p] = _fused_partial_eval
remat_rules[fused_p] = _fused_remat
set_dce_rule(fused_p, _fused_dce)
set_dce_rule(bwd_p, _bwd_dce)
