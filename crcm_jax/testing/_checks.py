"""Checks that other people's models can be put to, with readable reports.

Each check runs a model on given inputs, returns a report (a frozen dataclass
that prints as a table), and raises AssertionError with that table if the model
fails.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import (
  Array,
  Float,
  ParametricVelocity,
  Params,
  Velocity,
)
from crcm_jax.chunks import ChunkPattern

_STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TangentReport:
  """How a forward-mode tangent compares with central differences.

  Attributes:
    tangent_norm: norm of the tangent.
    steps: step sizes of the differences.
    errors: relative error at each step, a V: too large steps bend, too small
      ones round.
    float64_error: relative error against the tangent in float64: what the
      precision of the computation costs.
    tolerance: what the smallest error and that in float64 must reach.
  """

  tangent_norm: float
  steps: tuple[float, ...]
  errors: tuple[float, ...]
  float64_error: float
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether the tangent agrees at some step and with float64."""
    differences = min(self.errors, key=lambda e: (math.isnan(e), e))
    errors = (differences, self.float64_error)
    return all(error <= self.tolerance for error in errors)

  def __str__(self) -> str:
    rows = [
      f"  {step:<8.0e}  {error:.2e}"
      for step, error in zip(self.steps, self.errors, strict=True)
    ]
    verdict = "agrees" if self.passed else "DISAGREES"
    return "\n".join(
      [
        f"tangent of norm {self.tangent_norm:.4g} {verdict} with central"
        f" differences (relative tolerance {self.tolerance:.0e})",
        "  step      relative error",
        *rows,
        f"  float64   {self.float64_error:.2e}",
      ]
    )


def check_tangent(
  velocity: ParametricVelocity,
  params: Params,
  x_t: Float[Array, "*shape"],
  t: Float[Array, "*frames"],
  direction: Float[Array, "*shape"],
  *,
  reference: ParametricVelocity | None = None,
  tolerance: float = 1e-2,
) -> TangentReport:
  """Checks a network's forward-mode tangent along the ODE.

  Continuous-time consistency losses need the derivative of the velocity along
  `(direction, 1)`; a wrong or noisy one (a custom gradient rule, a low
  precision) makes them diverge. It is compared with central differences, and
  with itself in float64: parameters, data and times cast.

  Args:
    velocity: `velocity(params, x_t, t)`; arrays that it closes over keep
      their precision.
    params: its parameters, a pytree of arrays.
    x_t: noisy data, `[b, *frames, *features]`.
    t: times, best around the middle: the differences step out by 0.1.
    direction: the teacher's velocity, or any direction in x.
    reference: the same network in more precision, such as the float32 form of
      a bfloat16 network, whose own differences are all rounding. Differences
      and the tangent in float64 are then the reference's.
    tolerance: largest relative error allowed at the best step; about 1e-2 in
      float32 and 1e-6 in float64.

  Returns:
    The report.

  Raises:
    AssertionError: if no step size agrees, with the report.
  """
  exact = reference or velocity
  tangent = _tangent(velocity, params, x_t, t, direction).astype(x_t.dtype)
  size = jnp.linalg.norm(tangent.ravel())

  @jax.jit
  def error(step: Array) -> Array:
    after = exact(params, x_t + step * direction, t + step)
    before = exact(params, x_t - step * direction, t - step)
    difference = (after - before) / (2 * step) - tangent
    return jnp.linalg.norm(difference.ravel()) / jnp.maximum(size, 1e-12)

  report = TangentReport(
    tangent_norm=float(size),
    steps=_STEPS,
    errors=tuple(float(error(jnp.asarray(h, x_t.dtype))) for h in _STEPS),
    float64_error=_error_in_float64(tangent, exact, params, x_t, t, direction),
    tolerance=tolerance,
  )
  _raise_unless_passed(report)
  return report


def _tangent(velocity, params, x_t, t, direction) -> Array:
  """Returns the derivative of the velocity along `(direction, 1)`."""
  along = jax.jit(
    lambda p, x, t, d: jax.jvp(
      functools.partial(velocity, p), (x, t), (d, jnp.ones_like(t))
    )
  )
  return along(params, x_t, t, direction)[1]


def _error_in_float64(tangent: Array, velocity, *arguments) -> float:
  """Returns the relative error of a tangent against the one in float64."""
  with jax.enable_x64(True):
    exact = _tangent(velocity, *jax.tree.map(_float64, arguments))
  exact = np.asarray(exact, np.float64).ravel()
  error = np.linalg.norm(np.asarray(tangent, np.float64).ravel() - exact)
  return float(error / max(np.linalg.norm(exact), 1e-12))


def _float64(x: Array) -> Array:
  """Casts floats to float64, under `enable_x64`."""
  is_float = jnp.issubdtype(x.dtype, jnp.floating)
  return jnp.asarray(np.asarray(x), jnp.float64) if is_float else x


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalityReport:
  """Which chunk's input changes which chunk's output.

  Attributes:
    influence: `[output chunk, input chunk]`, the largest change.
    strict: whether a chunk may not see its own input either.
    tolerance: the largest change that counts as none.
  """

  influence: np.ndarray
  strict: bool
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether forbidden influences vanish and the nearest allowed do not."""
    allowed = self._allowed()
    quiet = self.influence[~allowed] <= self.tolerance
    loud = np.diagonal(self.influence, -1 if self.strict else 0)
    return bool(quiet.all() and (loud > self.tolerance).all())

  def __str__(self) -> str:
    allowed = self._allowed()
    rows = [
      "  "
      + " ".join(
        f"{value:9.1e}{' ' if ok else '!' if value > self.tolerance else '.'}"
        for value, ok in zip(row, row_allowed, strict=True)
      )
      for row, row_allowed in zip(self.influence, allowed, strict=True)
    ]
    kind = "strictly block-causal" if self.strict else "block-causal"
    verdict = "is" if self.passed else "is NOT"
    return "\n".join(
      [
        f"the model {verdict} {kind}. Rows: output chunk; columns: perturbed"
        " input chunk; '.': must be zero, '!': must be zero and is not",
        *rows,
      ]
    )

  def _allowed(self) -> np.ndarray:
    ones = np.ones_like(self.influence, bool)
    return np.tril(ones, -1 if self.strict else 0)


def check_block_causal(
  model: Callable[[Array], Array],
  x: Float[Array, "b f *features"],
  pattern: ChunkPattern,
  *,
  strict: bool = False,
  tolerance: float = 0.0,
) -> CausalityReport:
  """Checks that no chunk of the output sees a later chunk of the input.

  Every chunk is perturbed in turn; chunks before it must not change at all,
  and the chunk itself must.

  Args:
    model: maps a video to one of as many frames, all else closed over.
    x: the input, `[b, f, *features]`.
    pattern: how the frames form chunks.
    strict: forbids a chunk its own input as well: the clean context of
      teacher forcing, as seen by the noisy stream.
    tolerance: the largest change that counts as none.

  Returns:
    The report.

  Raises:
    AssertionError: if a forbidden influence exists, or an expected one does
      not, with the report.
  """
  spans = pattern.spans(x.shape[1])
  model = jax.jit(model)
  base = model(x)
  influence = np.zeros((len(spans), len(spans)))
  for column, (start, stop) in enumerate(spans):
    change = jnp.abs(model(x.at[:, start:stop].add(1.0)) - base)
    influence[:, column] = [float(change[:, a:b].max()) for a, b in spans]
  report = CausalityReport(
    influence=influence, strict=strict, tolerance=tolerance
  )
  _raise_unless_passed(report)
  return report


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityReport:
  """How a cached pass compares with the parallel one, chunk by chunk.

  Attributes:
    errors: relative error of each chunk's velocity.
    tolerance: the largest error allowed.
  """

  errors: tuple[float, ...]
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether every chunk agrees."""
    return all(error <= self.tolerance for error in self.errors)

  def __str__(self) -> str:
    verdict = "agrees" if self.passed else "DISAGREES"
    rows = [f"  {i:<6d} {error:.2e}" for i, error in enumerate(self.errors)]
    return "\n".join(
      [
        f"the cached pass {verdict} with the parallel one (relative tolerance"
        f" {self.tolerance:.0e})",
        "  chunk  relative error",
        *rows,
      ]
    )


def check_cache_parity(
  parallel: Velocity,
  chunks: Any,
  params: Any,
  x: Float[Array, "b f *features"],
  t: Float[Array, "b f"],
  context: Float[Array, "b f *features"],
  pattern: ChunkPattern,
  *,
  tolerance: float = 1e-4,
) -> ParityReport:
  """Checks that a cached, chunk-by-chunk model equals its parallel form.

  Args:
    parallel: `velocity(x, t)` of the whole video given the clean `context`, as
      teacher forcing evaluates it.
    chunks: a `sampling.ChunkModel` of the same network.
    params: its parameters.
    x: the noisy video, `[b, f, *features]`.
    t: times, one per frame.
    context: the clean video, committed to the cache chunk by chunk at time 0.
    pattern: how the frames form chunks.
    tolerance: largest relative error allowed in a chunk.

  Returns:
    The report.

  Raises:
    AssertionError: if a chunk disagrees, with the report.
  """
  expected = parallel(x, t)
  cache = chunks.init(params, x.shape[0], x.shape[1])
  errors = []
  for start, stop in pattern.spans(x.shape[1]):
    span = slice(start, stop)
    v = chunks.velocity(params, x[:, span], t[:, span], cache)
    _, cache = chunks.append(
      params, context[:, span], jnp.zeros_like(t[:, span]), cache
    )
    gap = jnp.linalg.norm((v - expected[:, span]).ravel())
    size = jnp.linalg.norm(expected[:, span].ravel())
    errors.append(float(gap / jnp.maximum(size, 1e-12)))
  report = ParityReport(errors=tuple(errors), tolerance=tolerance)
  _raise_unless_passed(report)
  return report


def _raise_unless_passed(
  report: TangentReport | CausalityReport | ParityReport,
) -> None:
  if not report.passed:
    raise AssertionError(str(report))
