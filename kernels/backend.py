"""What a backend computes, and how a call is described to it.

With visible scores `s = scale q . k`, `p = exp(s - lse)` and tangents written
`tq, tk, tv, ts, to`, the four passes are

    forward    o = p v,  lse = logsumexp(s)
    fused      o, lse and  to = p tv + (p ts) v - rowsum(p ts) o
    linear     to alone, from o and lse
    backward   the transpose of `linear`:
               dv = p^T do,  ds = p (do . v - rowsum(do o)),
               dq = scale ds k,  dk = scale ds^T q

(Causal-rCM, arXiv 2606.25473, appendix B). A backend implements these and
nothing else; `autodiff` makes them one differentiable operation.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array

from crcm_jax.kernels.mask import BlockMask


class Operands(NamedTuple):
  """The arrays of a call; keys and values in pairs, the context's first."""

  q: Array  # [b s n d]
  keys: tuple[Array, ...]  # each [b z n d]
  values: tuple[Array, ...]
  ranges: Array | None = None  # int32 [r, 2], disjoint: what of pair 0 is seen
  tables: tuple[Array, ...] = ()  # int32, from `Backend.tables`


class Tangents(NamedTuple):
  """Tangents of the floating-point operands; None is zero and costs nothing."""

  q: Array | None
  keys: tuple[Array | None, ...]
  values: tuple[Array | None, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is known of a call at trace time.

  Attributes:
    backend: Computes the passes.
    mask: Over the keys of all pairs; with `ranged`, of all but the first.
    scale: Factor on the scores.
    pairs: Number of (keys, values) pairs, 1 or 2.
    ranged: Whether run-time ranges say what of the first pair is visible.
    fused: Whether a jvp runs the fused pass; otherwise forward, then linear.
  """

  backend: "Backend"
  mask: BlockMask
  scale: float
  pairs: int
  ranged: bool
  fused: bool

  @property
  def num_floats(self) -> int:
    """How many of the flat operands are differentiable: q, then k, v pairs."""
    return 1 + 2 * self.pairs

  def operands(self, flat: Sequence[Array]) -> Operands:
    """Groups flat operands (q, k, v, ..., ranges, tables...)."""
    rest = tuple(flat[self.num_floats :])
    ranges, tables = (rest[0], rest[1:]) if self.ranged else (None, rest)
    floats = [one_token_axis(x) for x in flat[: self.num_floats]]
    return Operands(*_group(floats), ranges, tables)

  def tangents(
    self, flat: Sequence[Array], nonzero: Sequence[bool]
  ) -> Tangents:
    """Groups the nonzero tangents, putting None for the zero ones."""
    return Tangents(*_group(spread(map(one_token_axis, flat), nonzero)))

  def backward(
    self,
    flat: Sequence[Array],
    o: Array,
    lse: Array,
    do: Array,
    wanted: Sequence[bool],
  ) -> list[Array]:
    """Returns the wanted cotangents in the shapes of their flat operands."""
    x = self.operands(flat)
    grads = self.backend.backward(self, x, o, lse, do, wanted)
    shapes = [a.shape for a, w in zip(flat, wanted, strict=False) if w]
    return [g.reshape(s) for g, s in zip(grads, shapes, strict=True)]


def one_token_axis(x: Array) -> Array:
  """Joins the axes of tokens, `[b *s n d]` to `[b s n d]`.

  It is done inside the primitives for a context, so that its residual is the
  array that was given, such as a layer of a cache, and no copy.
  """
  return x.reshape(x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])


def _group(flat):
  return flat[0], tuple(flat[1::2]), tuple(flat[2::2])


def sum_dtype(dtype) -> jnp.dtype:
  """Returns the dtype to accumulate in: at least float32."""
  return jnp.dtype(dtype if dtype == jnp.float64 else jnp.float32)


def given(tangents: Sequence) -> tuple[list, tuple[bool, ...]]:
  """Returns the tangents that are not None, and which those are."""
  nonzero = tuple(t is not None for t in tangents)
  return [t for t in tangents if t is not None], nonzero


def spread(given: Iterable, nonzero: Sequence[bool]) -> list:
  """Puts None between the given tangents where one is zero."""
  items = iter(given)
  return [next(items) if n else None for n in nonzero]


@runtime_checkable
class Backend(Protocol):
  """One way to compute attention. Implementations are hashable.

  Outputs have the dtype of the queries, `lse [b s n]` at least float32; a query
  that sees nothing has output 0 and `lse` -inf. What is not visible may hold
  anything, NaN too, without reaching any result.
  """

  @property
  def name(self) -> str:
    """The `implementation` that selects it."""
    ...

  @property
  def platforms(self) -> tuple[str, ...]:
    """Where it is worth trying unasked: "cpu", "gpu", "tpu"."""
    ...

  def supports(self, problem: Problem, x: Operands) -> None:
    """Raises NotImplementedError, with the reason, for what it cannot do."""
    ...

  def tables(self, problem: Problem, x: Operands) -> tuple[Array, ...]:
    """Returns the mask as int32 arrays, which become operands.

    They are operands rather than constants so that the shards of one program
    can hold different rows.
    """
    ...

  def forward(self, problem: Problem, x: Operands) -> tuple[Array, Array]:
    """Returns `(o, lse)`."""
    ...

  def fused(
    self, problem: Problem, x: Operands, t: Tangents
  ) -> tuple[Array, Array, Array]:
    """Returns `(o, lse, to)`."""
    ...

  def linear(
    self, problem: Problem, x: Operands, o: Array, lse: Array, t: Tangents
  ) -> Array:
    """Returns `to`."""
    ...

  def backward(
    self,
    problem: Problem,
    x: Operands,
    o: Array,
    lse: Array,
    do: Array,
    wanted: Sequence[bool],
  ) -> list[Array]:
    """Returns the cotangents of those of q, k, v, ... that are `wanted`."""
    ...
