"""Derivatives of attention's tangents and cotangents, in plain JAX.

They differentiate the dense reference: right, and quadratic in memory. Each is
under `jax.checkpoint`, so that none of it is computed ahead of its use: where
the tangent of a jvp is stopped, all of it is dead code.
A list of tangents holds None for each one that is zero.
"""

import jax

from crcm_jax.kernels import reference
from crcm_jax.kernels.backend import given, Problem, spread


def tangent(problem: Problem, x, t, dx):
  """Derivative along `dx` of the output tangent along `t`; None if zero."""
  if all(d is None for d in dx):
    return None
  plain, floats = _plain(problem, x), x[: problem.num_floats]
  along_t = jax.checkpoint(lambda *floats: _jvp(plain, floats, t))
  return _jvp(along_t, floats, dx)


def cotangents(problem: Problem, x, do, dx, ddo, wanted):
  """Derivative along `dx` and `ddo` of the wanted cotangents."""
  plain, floats = _plain(problem, x), x[: problem.num_floats]

  @jax.checkpoint
  def backward(*args):
    *floats, do = args
    grads = jax.vjp(plain, *floats)[1](do)
    return [g for g, w in zip(grads, wanted, strict=True) if w]

  return _jvp(backward, [*floats, do], [*dx, ddo])


def _plain(problem: Problem, x):
  """The dense reference as a function of the floating-point operands."""
  rest = x[problem.num_floats :]
  return lambda *floats: reference.from_operands(
    problem, problem.operands([*floats, *rest])
  )


def _jvp(f, primals, tangents):
  """Tangent of `f` along the tangents that are not None."""
  live, nonzero = given(tangents)

  def along(*moved):
    moved = spread(moved, nonzero)
    return f(
      *[p if m is None else m for p, m in zip(primals, moved, strict=True)]
    )

  moving = [p for p, n in zip(primals, nonzero, strict=True) if n]
  return jax.jvp(along, moving, live)[1]
