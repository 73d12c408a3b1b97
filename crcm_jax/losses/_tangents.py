"""Tangents of networks that JAX cannot differentiate forward, or only apart.

A network's attention may be a `jax.custom_vjp`, which has no forward mode, or
have a jvp through which no gradient goes. JAX says so late, at lowering, and
not what to do; `naming_cures` says it at once. `central_difference` needs no
more than the network's values.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
from jax.interpreters import partial_eval

from crcm_jax._times import wide
from crcm_jax._typing import Array

Point = tuple[Array, Array]
"""Where to differentiate, `(x_t, t)`, or along what."""


def central_difference(
  velocity: Callable[[Array, Array], Array],
  point: Point,
  direction: Point,
  step: float,
) -> Array:
  """Returns `(v(p + h d) - v(p - h d)) / 2h`, in at least float32.

  Of second order: it exceeds the tangent by `h^2 / 6` times the third
  derivative along the direction, plus terms of `h^4`.

  Args:
    velocity: the network under fixed parameters.
    point: where, `(x_t, t)`.
    direction: along what.
    step: h, in units of time.

  Raises:
    ValueError: if the step is not positive.
  """
  if step <= 0:
    raise ValueError(f"`tangent_step` must be positive; got {step}.")

  def moved(h: float) -> Array:
    x, t = (
      wide(p) + h * wide(d) for p, d in zip(point, direction, strict=True)
    )
    return wide(velocity(x, t))

  return (moved(step) - moved(-step)) / (2 * step)


@contextlib.contextmanager
def naming_cures(
  velocity: Callable[[Array, Array], Array],
  point: Point,
  direction: Point,
  tangent_pass: str,
) -> Iterator[None]:
  """Turns JAX's errors about a network's tangent into ones that help.

  Args:
    velocity: the network under stopped parameters.
    point: where it is differentiated.
    direction: along what.
    tangent_pass: "shared" or "separate", what runs inside.

  Raises:
    NotImplementedError: if the network has no forward mode, or allows no
      gradient through it, with what to use instead.
  """
  tangent = lambda p, d: jax.jvp(velocity, p, d)[1]
  # Under jit, JAX would notice this only when the loss is out of sight.
  if _traced(point) and _is_of_custom_vjp(_trace(tangent, point, direction)):
    raise NotImplementedError(_no_forward_mode(tangent_pass))
  try:
    yield
  except Exception as error:
    if _trace(velocity, *point) is None:
      raise  # The network itself is at fault.
    apart = _trace(tangent, point, direction)
    works_apart = apart is not None and not _is_of_custom_vjp(apart)
    if tangent_pass == "shared" and works_apart:
      raise NotImplementedError(_NO_GRADIENT) from error
    raise NotImplementedError(_no_forward_mode(tangent_pass)) from error


def _no_forward_mode(tangent_pass: str) -> str:
  return (
    f'`velocity` must allow `jax.jvp` with `tangent_pass="{tangent_pass}"`;'
    " this network has no forward mode (often its attention is a"
    " `jax.custom_vjp`). Use `crcm_jax.kernels.attention` in it, or"
    ' `tangent_pass="finite_difference"`.'
  )


_NO_GRADIENT = (
  '`velocity` must allow a gradient through its jvp with `tangent_pass="shared"'
  '`; this network allows only the jvp. Use `tangent_pass="separate"`, or'
  " `crcm_jax.kernels.attention` in it."
)


def _traced(tree: Any) -> bool:
  return any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(tree))


def _trace(f: Callable[..., Array], *args: Any) -> Any:
  """Returns what a function computes, None if it cannot be traced.

  Without dead code: a `custom_vjp` whose tangent nobody uses does no harm.
  """
  try:
    jaxpr = jax.make_jaxpr(f)(*args).jaxpr
  except Exception:
    return None
  return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _is_of_custom_vjp(jaxpr: Any) -> bool:
  """Whether JAX put its mark for a tangent that it refuses at lowering."""
  for equation in () if jaxpr is None else jaxpr.eqns:
    if equation.primitive.name == "custom_lin":
      return True
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns") and _is_of_custom_vjp(inner):
          return True
  return False
