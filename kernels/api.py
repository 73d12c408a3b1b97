"""The public call: checks its arguments, picks a backend, binds the operation.

A backend asked for by name raises for what it cannot do. Unasked, those made
for the platform are tried in order, and "xla", which can do everything, ends
the list.
"""

import dataclasses
import functools
import itertools
import math
import os
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from crcm_jax.kernels import autodiff
from crcm_jax.kernels._compat import same_varying, target_platform
from crcm_jax.kernels.backend import (
  Backend,
  one_token_axis,
  Operands,
  Problem,
)
from crcm_jax.kernels.mask import BlockMask
from crcm_jax.kernels.pallas_tpu import PallasTpu
from crcm_jax.kernels.triton_backend import Triton
from crcm_jax.kernels.xla import Xla

BACKENDS: dict[str, Backend] = {
  "triton": Triton(),
  "pallas_tpu": PallasTpu(),
  "xla": Xla(),
}
"""Backends by name, the preferred first; "xla" supports everything."""

MOST_RANGES = 4


def attention(
  q: Float[Array, "b *s n d"],
  k: Float[Array, "b *z n d"] | None,
  v: Float[Array, "b *z n d"] | None,
  *,
  context: tuple[Float[Array, "b *y n d"], Float[Array, "b *y n d"]]
  | None = None,
  context_ranges: Int[Array, "r 2"] | None = None,
  mask: BlockMask | None = None,
  scale: float | None = None,
  implementation: str | Backend | None = None,
) -> Float[Array, "b *s n d"]:
  """Attends to a context and to the queries' own stream, under one softmax.

      o_i = sum_j softmax_j(scale q_i . k_j) v_j,   j in visible [context | own]

  Under `jax.jvp` one pass computes output and tangent, under `jax.grad` the
  backward is recomputed from output and log-sum-exp; both work inside `jit`,
  `vmap`, `lax.scan`, `jax.checkpoint` (policy: `kernels.save_attention`),
  `lax.cond` and `shard_map`. Tangents that are zero at trace time and
  cotangents that nobody wants cost nothing. Differentiating a tangent or a
  gradient once more works, in memory quadratic in tokens.

  Tokens may have several axes, such as frames and patches: they count as one,
  the last axis fastest.

  Args:
    q: Queries.
    k: Keys of the queries' own stream (cross attention: of the text); None
      attends to the context alone.
    v: Their values; None with `k`.
    context: Keys and values of the history: a clean stream, or a cache.
    context_ranges: int32 `[r, 2]`, 1 <= r <= 4: at run time, only these (start,
      stop) tokens of the context are visible, to all queries. Their union
      counts; work grows with it, not with the size of the context. None: the
      mask speaks about the context too.
    mask: Which keys each query sees: over `[context | own]`, or with
      `context_ranges` over the own keys alone. None: all.
    scale: Factor on the scores; None is `d**-0.5`.
    implementation: "triton" (NVIDIA), "pallas_tpu", "xla", or a backend object
      such as `kernels.Xla(...)`. None: the best that supports the call on the
      devices of the mesh in context (`jax.set_mesh`), or else on JAX's default
      ones.

  Returns:
    The output, in the dtype of `q`; 0 for a query that sees nothing.

  Raises:
    ValueError: Shapes that do not fit, an unknown implementation.
    TypeError: Arrays of different or of non-floating-point dtypes.
    NotImplementedError: The named implementation does not support the call.

  Example:
    >>> import jax.numpy as jnp
    >>> from crcm_jax import kernels
    >>> q = k = v = jnp.ones((1, 6, 2, 8))
    >>> mask = kernels.BlockMask.block_causal((0, 2, 4, 6))
    >>> kernels.attention(q, k, v, mask=mask).shape
    (1, 6, 2, 8)

  References:
    Causal-rCM, arXiv 2606.25473, appendix B (the tangent of masked attention).
  """
  shape = q.shape
  q, (k, v) = _one_token_axis(q), jax.tree.map(_one_token_axis, (k, v))
  pairs = _pairs(k, v, context)
  _check_arrays(q, pairs)
  if context_ranges is not None and context is None:
    raise ValueError("`context_ranges` needs a `context` to be about.")
  ranged = context_ranges is not None
  lengths = [math.prod(keys.shape[1:-2]) for keys, _ in pairs]
  mask = _full_or_checked(mask, q.shape[1], lengths, ranged)
  # Backends need not think of empty arrays.
  ranged = ranged and pairs[0][0].size > 0
  pairs = [pair for pair in pairs if pair[0].size > 0]
  if q.size == 0 or not pairs:
    return jnp.zeros_like(q).reshape(shape)
  problem = Problem(
    backend=BACKENDS["xla"],
    mask=mask,
    scale=float(q.shape[-1] ** -0.5 if scale is None else scale),
    pairs=len(pairs),
    ranged=ranged,
    fused=_fused_rule(),
  )
  flat = [q, *itertools.chain(*pairs)]
  if ranged:
    flat.append(_disjoint(context_ranges, lengths[0]))
  problem = _with_backend(problem, problem.operands(flat), implementation)
  flat.extend(problem.backend.tables(problem, problem.operands(flat)))
  return autodiff.bind(problem, *same_varying(*flat)).reshape(shape)


def _one_token_axis(x: Array) -> Array:
  return x if x.ndim < 4 else one_token_axis(x)  # `_check_arrays` refuses


def _fused_rule() -> bool:
  """Reads the escape hatch, should a JAX release break the fused rule."""
  rule = os.environ.get("CRCM_ATTENTION_RULE", "fused")
  if rule not in ("fused", "unfused"):
    raise ValueError(
      f"`CRCM_ATTENTION_RULE` must be 'fused' or 'unfused'; got {rule!r}."
    )
  return rule == "fused"


def _pairs(k, v, context) -> list[tuple[Array, Array]]:
  """The (keys, values) to attend to, context first."""
  if (k is None) != (v is None):
    raise ValueError(
      "`k` and `v` must be given together; one of them is None. Pass both, or "
      "neither to attend to `context` alone."
    )
  pairs = [pair for pair in (context, (k, v)) if pair and pair[0] is not None]
  if not pairs:
    raise ValueError(
      "`k`, `v` or `context` must be given: there is nothing to attend to."
    )
  return pairs


def _check_arrays(q, pairs):
  if q.ndim != 4:
    raise ValueError(
      f"`q` must have the axes [b s n d] (batch, tokens, heads, width); got "
      f"shape {q.shape}."
    )
  b, _, n, d = q.shape
  for keys, values in pairs:
    for x in (keys, values):
      if x.ndim < 4 or (x.shape[0], *x.shape[-2:]) != (b, n, d):
        raise ValueError(
          f"keys and values must be ({b}, tokens, {n}, {d}) to fit `q` of "
          f"shape {q.shape}; got {x.shape}. Axes are [b z n d], heads after "
          f"tokens."
        )
      if x.dtype != q.dtype:
        raise TypeError(
          f"keys and values must have the dtype of `q`, {q.dtype}; got "
          f"{x.dtype}. Cast them, for instance a cache kept in another dtype."
        )
    if keys.shape != values.shape:
      raise ValueError(
        f"keys and values must have one shape; got {keys.shape} and "
        f"{values.shape}."
      )
  if not jnp.issubdtype(q.dtype, jnp.floating):
    raise TypeError(f"`q` must be of a floating-point dtype; got {q.dtype}.")


def _full_or_checked(mask, queries: int, lengths, ranged: bool) -> BlockMask:
  """The mask over the keys that run-time ranges do not rule."""
  keys = sum(lengths[ranged:])
  if mask is None:
    return BlockMask.full(queries, keys)
  if (mask.num_queries, mask.num_keys) != (queries, keys):
    about = "own keys (`context_ranges` rules the context)"
    raise ValueError(
      f"`mask` must be about {queries} queries and {keys} "
      f"{about if ranged else 'keys [context | own]'}; it is about "
      f"{mask.num_queries} and {mask.num_keys}. Build it from the token "
      f"boundaries of this very sequence."
    )
  return mask


def _disjoint(ranges, size: int):
  """The union of run-time ranges as disjoint ascending ones within `size`."""
  few = ranges.ndim == 2 and 1 <= len(ranges) <= MOST_RANGES
  if not few or ranges.shape[1] != 2:
    raise ValueError(
      f"`context_ranges` must be int32 [r, 2], 1 <= r <= {MOST_RANGES}, of "
      f"(start, stop) tokens; got shape {ranges.shape}. Join neighbouring "
      f"ranges; (0, 0) sees nothing."
    )
  if not jnp.issubdtype(ranges.dtype, jnp.integer):
    raise TypeError(
      f"`context_ranges` must be integers; got {ranges.dtype}. Use "
      f"`jnp.array([[0, written]], jnp.int32)`."
    )
  ranges = jnp.clip(ranges.astype(jnp.int32), 0, size)
  start = ranges[:, 0]
  if len(ranges) > 1:  # one, as in each layer of a rollout's calls, is sorted
    ranges = ranges[jnp.argsort(start)]
    reached = jax.lax.cummax(ranges[:, 1])
    before = jnp.concatenate([jnp.zeros_like(reached[:1]), reached[:-1]])
    start = jnp.maximum(ranges[:, 0], before)
  return jnp.stack([start, jnp.maximum(start, ranges[:, 1])], axis=1)


def _with_backend(problem: Problem, x: Operands, implementation) -> Problem:
  """The problem with the backend asked for, or with the best that fits."""
  if isinstance(implementation, str):
    if implementation not in BACKENDS:
      raise ValueError(
        f"`implementation` must be one of {sorted(BACKENDS)}; got "
        f"{implementation!r}. None picks the best that supports the call."
      )
    implementation = BACKENDS[implementation]
  if implementation is not None:
    problem = dataclasses.replace(problem, backend=implementation)
    implementation.supports(problem, x)
    return problem
  platform = target_platform()
  for backend in BACKENDS.values():
    if platform not in backend.platforms:
      continue
    candidate = dataclasses.replace(problem, backend=backend)
    try:
      backend.supports(candidate, x)
    except NotImplementedError as reason:
      _warn_once(f"attention falls back from {backend.name!r}: {reason}")
    else:
      return candidate
  raise AssertionError("the last backend supports every call")


@functools.cache
def _warn_once(message: str):
  warnings.warn(message, stacklevel=4)
