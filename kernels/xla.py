"""The backend "xla": exact attention in plain JAX, on every platform.

Queries are taken a tile at a time, and only the key ranges that the tile sees
are read: a mask saves the work that it forbids. A mask with few short rows is
unrolled, one tile a row, exact slices. Otherwise a loop over tiles reads its
ranges from int32 tables, and long key ranges are always walked in a loop with
the online softmax: memory grows linearly with queries and keys.
Inside, heads come before tokens: tiles are `[b, n, tokens, d]`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from crcm_jax.kernels._compat import vary_like
from crcm_jax.kernels.backend import Operands, Problem, sum_dtype, Tangents

_LOWEST = -1e30  # finite: the difference of two such is 0, not NaN
_MOST_ROWS = 16  # of a mask that is unrolled


class _Tile(NamedTuple):
  """The tokens [start, start + size) of an array; `valid` marks those meant."""

  start: Any  # int or int32 []
  size: int
  valid: Array | None  # [size]; None: all


class _Keys(NamedTuple):
  """A tile of one key array, loaded."""

  pair: int
  tile: _Tile
  k: Array  # [b n tile d]
  v: Array
  tk: Array | None
  tv: Array | None


_Span: TypeAlias = tuple[Any, Any]  # (start, stop), ints or int32 []
_Piece: TypeAlias = tuple[int, _Tile | _Span]  # keys of a pair that are visible


@dataclasses.dataclass(frozen=True)
class Xla:
  """Plain JAX: any shape, mask and dtype; float64 stays float64.

  Attributes:
    block_queries: Most queries in a tile.
    block_keys: Most keys in a tile.
  """

  block_queries: int = 512
  block_keys: int = 1024
  name: str = "xla"
  platforms: tuple[str, ...] = ("cpu", "gpu", "tpu")

  def supports(self, problem: Problem, x: Operands) -> None:
    """Accepts every call."""

  def tables(self, problem: Problem, x: Operands) -> tuple[Array, ...]:
    """Returns nothing for a mask to unroll, else queries and keys of tiles."""
    mask, lengths = problem.mask, [k.shape[1] for k in x.keys[problem.ranged :]]
    longest = max(stop - start for (start, stop), _ in mask.rows)
    if longest <= self.block_queries and len(mask.rows) <= _MOST_ROWS:
      return ()
    table = mask.tile_table(self.block_queries, lengths)
    return tuple(map(jnp.asarray, (table.queries, *table.keys)))

  def forward(self, problem: Problem, x: Operands) -> tuple[Array, Array]:
    """Computes `o = softmax(s) v` and `lse`."""

    def tile(at, pieces, out):
      q = _load(x.q, at)

      def step(state, keys):
        m, total, acc = state
        m, p, decay = _online_softmax(m, _scores(problem, q, keys), keys)
        total = decay * total + p.sum(-1)
        return (
          m,
          total,
          decay[..., None] * acc + _dot("bnqk,bnkd->bnqd", p, keys.v),
        )

      state = (*_no_scores(q), _zeros_like(q))
      m, total, acc = self._fold(step, state, pieces, x)
      return _store(out, at, (_divided(acc, total), _log_sum(m, total)))

    out = (_zeros_like(x.q, x.q.dtype), _lse_buffer(x.q))
    return self._over_queries(problem, x, tile, out)

  def fused(
    self, problem: Problem, x: Operands, t: Tangents
  ) -> tuple[Array, Array, Array]:
    """Computes output, `lse` and output tangent in one sweep over the keys."""

    def tile(at, pieces, out):
      q, tq = _load(x.q, at), _maybe_load(t.q, at)

      def step(state, keys):
        m, total, acc, r, tacc = state
        m, p, decay = _online_softmax(m, _scores(problem, q, keys), keys)
        dr, dtacc = _tangent_terms(problem, q, tq, keys, p)
        total, r, decay = (
          decay * total + p.sum(-1),
          decay * r + dr,
          decay[..., None],
        )
        acc = decay * acc + _dot("bnqk,bnkd->bnqd", p, keys.v)
        return m, total, acc, r, decay * tacc + dtacc

      m, total = _no_scores(q)
      state = (m, total, _zeros_like(q), total, _zeros_like(q))
      m, total, acc, r, tacc = self._fold(step, state, pieces, x, t)
      o = _divided(acc, total)
      to = _divided(tacc - r[..., None] * o, total)
      return _store(out, at, (o, _log_sum(m, total), to))

    o = _zeros_like(x.q, x.q.dtype)
    return self._over_queries(problem, x, tile, (o, _lse_buffer(x.q), o))

  def linear(
    self, problem: Problem, x: Operands, o: Array, lse: Array, t: Tangents
  ) -> Array:
    """Computes the output tangent from a saved output and `lse`."""

    def tile(at, pieces, out):
      q, tq = _load(x.q, at), _maybe_load(t.q, at)
      row_lse = _load_lse(lse, at)

      def step(state, keys):
        r, tacc = state
        p = _probabilities(_scores(problem, q, keys), row_lse, keys)
        dr, dtacc = _tangent_terms(problem, q, tq, keys, p)
        return r + dr, tacc + dtacc

      state = (_no_scores(q)[1], _zeros_like(q))
      r, tacc = self._fold(step, state, pieces, x, t)
      to = tacc - r[..., None] * _load(o, at).astype(tacc.dtype)
      return _store(out, at, (to,))

    out = (_zeros_like(x.q, x.q.dtype),)
    return self._over_queries(problem, x, tile, out)[0]

  def backward(
    self,
    problem: Problem,
    x: Operands,
    o: Array,
    lse: Array,
    do: Array,
    wanted: Sequence[bool],
  ) -> list[Array]:
    """Computes the wanted cotangents in one sweep over queries and keys."""
    want_q, want_k, want_v = wanted[0], wanted[1::2], wanted[2::2]

    def tile(at, pieces, out):
      q, row_do, row_lse = _load(x.q, at), _load(do, at), _load_lse(lse, at)
      delta = _row_dot(row_do, _load(o, at))

      def step(state, keys):
        dq, dk, dv = state
        i = keys.pair
        p = _probabilities(_scores(problem, q, keys), row_lse, keys)
        if want_v[i]:
          dv = _add(dv, keys, _dot("bnqk,bnqd->bnkd", p, row_do))
        if want_q or want_k[i]:
          dp = _dot("bnqd,bnkd->bnqk", row_do, keys.v)
          ds = problem.scale * p * (dp - delta[..., None])
          if want_q:
            dq = dq + _dot("bnqk,bnkd->bnqd", ds, keys.k)
          if want_k[i]:
            dk = _add(dk, keys, _dot("bnqk,bnqd->bnkd", ds, q))
        return dq, dk, dv

      dq, dk, dv = out
      row_dq = _zeros_like(q) if want_q else None
      row_dq, dk, dv = self._fold(step, (row_dq, dk, dv), pieces, x)
      return (_write(dq, at, row_dq) if want_q else None, dk, dv)

    buffers = lambda xs, want: tuple(
      _zeros_like(a) if w else None for a, w in zip(xs, want, strict=True)
    )
    out = (
      _zeros_like(x.q, x.q.dtype) if want_q else None,
      buffers(x.keys, want_k),
      buffers(x.values, want_v),
    )
    dq, dk, dv = self._over_queries(problem, x, tile, out)
    flat = [dq, *itertools.chain(*zip(dk, dv, strict=True))]
    return [g.astype(x.q.dtype) for g in flat if g is not None]

  def _over_queries(self, problem, x: Operands, tile: Callable, out) -> Any:
    """Runs `out = tile(queries, pieces, out)` for every tile of queries."""
    context = self._context_pieces(x)
    first = int(problem.ranged)  # pair that the mask begins with
    if not x.tables:
      for row in problem.mask.rows:
        start, stop = row.queries
        split = problem.mask.split(row, [k.shape[1] for k in x.keys[first:]])
        pieces = [
          (i, self._piece(span))
          for i, spans in enumerate(split, first)
          for span in spans
        ]
        if start < stop:
          out = tile(_Tile(start, stop - start, None), context + pieces, out)
      return out

    size = problem.mask.tile_size(self.block_queries)
    queries, *tables = x.tables

    def body(i, out):
      at = _tile(queries[i, 0], queries[i, 1], size, x.q.shape[1])
      pieces = [
        (pair, (table[i, r, 0], table[i, r, 1]))
        for pair, table in enumerate(tables, first)
        for r in range(table.shape[1])
      ]
      return tile(at, context + pieces, out)

    return _loop(queries.shape[0], body, out)

  def _context_pieces(self, x: Operands) -> list[_Piece]:
    """What run-time ranges leave visible of the first pair."""
    if x.ranges is None:
      return []
    size = x.keys[0].shape[1]
    spans = [(x.ranges[r, 0], x.ranges[r, 1]) for r in range(len(x.ranges))]
    if size > self.block_keys:
      return [(0, span) for span in spans]
    token = jnp.arange(size, dtype=jnp.int32)
    seen = [(token >= start) & (token < stop) for start, stop in spans]
    return [(0, _Tile(0, size, functools.reduce(jnp.logical_or, seen)))]

  def _piece(self, span: tuple[int, int]) -> _Tile | _Span:
    start, stop = span
    if stop - start > self.block_keys:
      return span
    return _Tile(start, stop - start, None)

  def _fold(self, step, state, pieces, x: Operands, t: Tangents | None = None):
    """Folds `state = step(state, keys)` over the visible tiles of keys."""
    for pair, piece in pieces:
      load = functools.partial(_load_keys, x, t, pair)
      if isinstance(piece, _Tile):
        state = step(state, load(piece))
      else:
        state = self._walk(
          lambda s, at, load=load: step(s, load(at)),
          state,
          piece,
          x.keys[pair].shape[1],
        )
    return state

  def _walk(self, step, state, span: _Span, length: int):
    """Folds `step(state, tile)` over the tiles of a span."""
    start, stop = span
    size = min(self.block_keys, length)
    return _loop(
      (stop - start + size - 1) // size,
      lambda j, s: step(s, _tile(start + j * size, stop, size, length)),
      state,
    )


def _loop(count, body, state):
  """Runs `state = body(i, state)` with an int32 counter."""
  return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), body, state)


def _tile(start, stop, size: int, length: int) -> _Tile:
  """The tile of `size` tokens at `start`, moved inside an array of `length`."""
  at = jnp.minimum(start, length - size)
  token = at + jnp.arange(size, dtype=jnp.int32)
  return _Tile(at, size, (token >= start) & (token < stop))


def _cut(x, at: _Tile, axis: int):
  """Takes a tile; what is not meant becomes 0, so that NaN cannot leak."""
  x = jax.lax.dynamic_slice_in_dim(x, at.start, at.size, axis)
  if at.valid is None:
    return x
  return jnp.where(_along(at.valid, axis, x.ndim), x, jnp.zeros((), x.dtype))


def _along(valid, axis: int, ndim: int):
  return valid.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _load(x: Array, at: _Tile) -> Array:
  """A tile [b n tile d] of [b tokens n d]."""
  return _cut(x, at, 1).swapaxes(1, 2)


def _maybe_load(x: Array | None, at: _Tile) -> Array | None:
  return None if x is None else _load(x, at)


def _load_keys(x: Operands, t: Tangents | None, pair: int, at: _Tile) -> _Keys:
  return _Keys(
    pair,
    at,
    _load(x.keys[pair], at),
    _load(x.values[pair], at),
    _maybe_load(t.keys[pair] if t else None, at),
    _maybe_load(t.values[pair] if t else None, at),
  )


def _load_lse(lse: Array, at: _Tile) -> Array:
  return _cut(lse, at, 2)


def _store(buffers, at: _Tile, tiles):
  """Writes tiles [b n tile d] or [b n tile] into their buffers."""
  return tuple(
    _write(buffer, at, tile)
    for buffer, tile in zip(buffers, tiles, strict=True)
  )


def _write(buffer, at: _Tile, tile):
  axis = 1 if tile.ndim == 4 else 2
  tile = (tile.swapaxes(1, 2) if tile.ndim == 4 else tile).astype(buffer.dtype)
  if at.valid is not None:
    old = jax.lax.dynamic_slice_in_dim(buffer, at.start, at.size, axis)
    tile = jnp.where(_along(at.valid, axis, tile.ndim), tile, old)
  return jax.lax.dynamic_update_slice_in_dim(buffer, tile, at.start, axis)


def _add(buffers, keys: _Keys, tile):
  """Adds a tile [b n tile d] of cotangents to the buffer of its pair."""
  buffer, at = buffers[keys.pair], keys.tile
  old = jax.lax.dynamic_slice_in_dim(buffer, at.start, at.size, 1)
  new = jax.lax.dynamic_update_slice_in_dim(
    buffer, old + tile.swapaxes(1, 2), at.start, 1
  )
  return (*buffers[: keys.pair], new, *buffers[keys.pair + 1 :])


def _zeros_like(x, dtype=None):
  return vary_like(jnp.zeros(x.shape, dtype or sum_dtype(x.dtype)), x)


def _lse_buffer(q):
  b, s, n, _ = q.shape
  return vary_like(jnp.zeros((b, n, s), sum_dtype(q.dtype)), q)


def _no_scores(q):
  """Running maximum and sum before any key: tiles [b n tile]."""
  zero = vary_like(jnp.zeros(q.shape[:3], sum_dtype(q.dtype)), q)
  return zero + _LOWEST, zero


def _dot(equation: str, a, b):
  """A product in the dtype of `b`, accumulated in at least float32."""
  return jnp.einsum(
    equation, a.astype(b.dtype), b, preferred_element_type=sum_dtype(b.dtype)
  )


def _row_dot(a, b):
  dtype = sum_dtype(a.dtype)
  return (a.astype(dtype) * b.astype(dtype)).sum(-1)


def _scores(problem: Problem, q, keys: _Keys):
  return problem.scale * _dot("bnqd,bnkd->bnqk", q, keys.k)


def _online_softmax(m, s, keys: _Keys):
  """New running maximum, exp(s - m), and the factor on what came before."""
  valid = keys.tile.valid
  if valid is not None:
    s = jnp.where(_along(valid, 3, 4), s, _LOWEST)
  new = jnp.maximum(m, s.max(-1))
  return new, _only(valid, jnp.exp(s - new[..., None])), jnp.exp(m - new)


def _probabilities(s, lse, keys: _Keys):
  return _only(keys.tile.valid, jnp.exp(s - lse[..., None]))


def _only(valid, p):
  return p if valid is None else jnp.where(_along(valid, 3, 4), p, 0)


def _tangent_terms(problem: Problem, q, tq, keys: _Keys, p):
  """rowsum(p ts) and p tv + (p ts) v, without the products of zeros."""
  ts = [
    _dot("bnqd,bnkd->bnqk", a, b)
    for a, b in ((tq, keys.k), (q, keys.tk))
    if a is not None and b is not None
  ]
  mixed = [] if keys.tv is None else [_dot("bnqk,bnkd->bnqd", p, keys.tv)]
  if not ts:
    return 0, sum(mixed)
  pts = p * (problem.scale * sum(ts))
  mixed.append(_dot("bnqk,bnkd->bnqd", pts, keys.v))
  return pts.sum(-1), sum(mixed)


def _divided(acc, total):
  """Divides by the sum of the weights; 0 where nothing was seen."""
  total = total[..., None]
  return jnp.where(total == 0, 0, acc / jnp.where(total == 0, 1, total))


def _log_sum(m, total):
  return m + jnp.log(total)
