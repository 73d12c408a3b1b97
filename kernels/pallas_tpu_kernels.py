"""The bodies of the TPU kernels: what one grid step does with its tiles.

`attend` accumulates a query tile over its key tiles, `dq` and `dkv` are the
backward. A step runs in phases: start with the first step of an output tile,
fold the visible keys in, finish with the last. A tile that is visible as a
whole is folded at once and unmasked. Of a boundary tile only the sub-tiles that
hold visible keys are folded; what is not visible is replaced by 0 when it is
loaded, so that NaN cannot leak.

Scores are in units of log 2, `exp2` being what the chip has. Row statistics
are `[block_q, 128]`: maxima with all lanes equal, sums one part a lane.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from crcm_jax.kernels.pallas_tpu_layout import LANES
from crcm_jax.kernels.pallas_tpu_plan import HIGH, LOW, OUT, PAIR

LOG2_E = math.log2(math.e)
_LOWEST = -1e30  # finite: the difference of two such is 0, not NaN


class Queries(NamedTuple):
  """Tiles of what the queries bring; None is not read."""

  q: Any  # [block_q, d]
  tq: Any = None
  o: Any = None
  do: Any = None
  lse: Any = None  # [1, block_q]
  delta: Any = None  # [1, block_q], rowsum(do o)


class Keys(NamedTuple):
  """Tiles of one pair of keys and values; None is a tangent that is zero."""

  k: Any  # [block_k, d]
  v: Any
  tk: Any = None
  tv: Any = None


class Outputs(NamedTuple):
  """Output tiles of `attend`; None is not computed."""

  o: Any = None  # [block_q, d]
  lse: Any = None  # [1, block_q]
  to: Any = None


class Sums(NamedTuple):
  """Running sums of `attend`, float32; None is not needed."""

  m: Any  # [block_q, 128], the maximum, or the final lse
  total: Any = None  # [block_q, 128], sum of p
  acc: Any = None  # [block_q, d], p v
  r: Any = None  # [block_q, 128], sum of p ts
  mixed: Any = None  # [block_q, d], (p ts) v
  moved: Any = None  # [block_q, d], p tv


# --- Output, log-sum-exp, and output tangent ---


def attend(table, queries: Queries, pairs, out: Outputs, sums: Sums, *, scale):
  """Output and `lse`, with tangents also `to`; with a given `lse` only `to`."""
  i = pl.program_id(2)

  @pl.when(_first(table, i))
  def _start():
    for ref in sums:
      if ref is not None:
        ref[...] = jnp.zeros_like(ref)
    if queries.lse is None:
      sums.m[...] = jnp.full_like(sums.m, _LOWEST)
    else:
      sums.m[...] = LOG2_E * _column(queries.lse[...])

  def fold(keys, seen):
    _attend_keys(queries, keys, seen, sums, scale)

  _fold_visible(table, i, pairs, fold)

  @pl.when(_last(table, i))
  def _finish():
    _write_outputs(queries, out, sums, scale)


def _attend_keys(queries: Queries, keys: Keys, seen, sums: Sums, scale):
  """Folds loaded keys `[tile, d]` into the running sums."""
  q = queries.q[...]
  s = _dot_nt(q, keys.k) * (scale * LOG2_E)  # [block_q, tile]
  if seen is not None:
    s = jnp.where(seen.along(1), s, _LOWEST)
  p, decay = _probabilities(s, sums, online=queries.lse is None)
  rounded = p.astype(keys.v.dtype)
  if sums.acc is not None:
    _add(sums.total, decay, _lane_sums(p))
    _add(sums.acc, decay, _dot(rounded, keys.v))
  if sums.moved is not None:
    moved = None if keys.tv is None else _dot(rounded, keys.tv)
    _add(sums.moved, decay, moved)
  if sums.mixed is not None:
    ts = _score_tangents(queries, keys, q)
    pts = None if ts is None else p * ts  # without `scale`, which comes last
    _add(sums.r, decay, None if pts is None else _lane_sums(pts))
    mixed = None if pts is None else _dot(pts.astype(keys.v.dtype), keys.v)
    _add(sums.mixed, decay, mixed)


def _probabilities(s, sums: Sums, online: bool):
  """exp(s - m), and the factor on what was summed with the old maximum."""
  before = sums.m[...]  # [block_q, 128]
  if not online:
    return jnp.exp2(s - _widen(before, s.shape[1])), None
  m = jnp.maximum(before, s.max(-1, keepdims=True))
  sums.m[...] = m
  return jnp.exp2(s - _widen(m, s.shape[1])), jnp.exp2(before - m)


def _score_tangents(queries: Queries, keys: Keys, q):
  """Returns tq k + q tk without products of zeros; None if none is left."""
  ts = []
  if queries.tq is not None:
    ts.append(_dot_nt(queries.tq[...], keys.k))
  if keys.tk is not None:
    ts.append(_dot_nt(q, keys.tk))
  return sum(ts[1:], ts[0]) if ts else None


def _write_outputs(queries: Queries, out: Outputs, sums: Sums, scale):
  if queries.lse is None:
    total = sums.total[...].sum(-1, keepdims=True)  # [block_q, 1]
    inverse = 1 / jnp.where(total == 0, 1, total)
    o = sums.acc[...] * inverse
    out.o[...] = o.astype(out.o.dtype)
    lse = (sums.m[...] + jnp.log2(total)) / LOG2_E
    out.lse[...] = lse.T[:1]
  else:
    o, inverse = queries.o[...].astype(jnp.float32), 1.0
  if out.to is None:
    return
  to = jnp.zeros_like(o)
  if sums.mixed is not None:
    r = sums.r[...].sum(-1, keepdims=True)
    to += scale * inverse * (sums.mixed[...] - r * o)
  if sums.moved is not None:
    to += inverse * sums.moved[...]
  out.to[...] = to.astype(out.to.dtype)


# --- Cotangents ---


class Columns(NamedTuple):
  """Scratch of `dq`: row statistics as columns, and the sum, float32."""

  lse: Any  # [block_q, 128], lanes equal
  delta: Any
  acc: Any  # [block_q, d]


def dq(table, queries: Queries, pairs, out, sums: Columns, *, scale):
  """Cotangent of a query tile, over its key tiles."""
  i = pl.program_id(2)

  @pl.when(_first(table, i))
  def _start():
    sums.lse[...] = LOG2_E * _column(queries.lse[...])
    sums.delta[...] = _column(queries.delta[...])
    sums.acc[...] = jnp.zeros_like(sums.acc)

  def fold(keys, seen):
    width = keys.k.shape[0]
    s = _dot_nt(queries.q[...], keys.k) * (scale * LOG2_E)  # [block_q, tile]
    p = jnp.exp2(s - _widen(sums.lse[...], width))
    dp = _dot_nt(queries.do[...], keys.v)
    ds = p * (dp - _widen(sums.delta[...], width))  # without `scale`
    if seen is not None:
      ds = jnp.where(seen.along(1), ds, 0)
    _add(sums.acc, None, _dot(ds.astype(keys.k.dtype), keys.k))

  _fold_visible(table, i, pairs, fold)

  @pl.when(_last(table, i))
  def _finish():
    out[...] = (scale * sums.acc[...]).astype(out.dtype)


def dkv(table, queries: Queries, keys: Keys, out: Keys, sums: Keys, *, scale):
  """Cotangents of a tile of keys and values, over the query tiles that see it.

  Scores are transposed, `[tile, block_q]`: the statistics of a query then lie
  along lanes as they are stored, and no product needs a transpose.
  """
  i = pl.program_id(2)

  @pl.when(_first(table, i))
  def _start():
    for ref in sums:
      if ref is not None:
        ref[...] = jnp.zeros_like(ref)

  def fold(at, seen):
    k = _load(keys.k, at, seen)
    q, do = queries.q[...], queries.do[...]
    s = _dot_nt(k, q) * (scale * LOG2_E)  # [tile, block_q]
    p = jnp.exp2(s - LOG2_E * queries.lse[...])
    if sums.v is not None:
      _add_rows(sums.v, at, seen, _dot(p.astype(do.dtype), do))
    if sums.k is not None:
      dp = _dot_nt(_load(keys.v, at, seen), do)
      ds = p * (dp - queries.delta[...])  # without `scale`
      _add_rows(sums.k, at, seen, _dot(ds.astype(q.dtype), q))

  _visit(table[LOW, i], table[HIGH, i], keys.k.shape[0], fold)

  @pl.when(_last(table, i))
  def _finish():
    if sums.v is not None:
      out.v[...] = sums.v[...].astype(out.v.dtype)
    if sums.k is not None:
      out.k[...] = (scale * sums.k[...]).astype(out.k.dtype)


# --- Steps, tiles ---


class _Seen(NamedTuple):
  """Which keys of a sub-tile are visible; None in its place is all."""

  low: Any  # int32 []
  high: Any
  size: int

  def along(self, axis: int):
    """The mask as a column [size, 1] or a row [1, size]."""
    shape = (self.size, 1) if axis == 0 else (1, self.size)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return (self.low <= key) & (key < self.high)


def _first(table, i):
  return (i == 0) | (table[OUT, jnp.maximum(i - 1, 0)] != table[OUT, i])


def _last(table, i):
  return table[OUT, i + 1] != table[OUT, i]


def _fold_visible(table, i, pairs, fold):
  """Runs `fold(keys, seen)` for what step i shows of its pair."""
  for pair, refs in enumerate(pairs):

    @pl.when(table[PAIR, i] == pair)
    def _of_pair(refs=refs):
      load = lambda at, seen: Keys(*(_load(ref, at, seen) for ref in refs))
      _visit(
        table[LOW, i],
        table[HIGH, i],
        refs.k.shape[0],
        lambda at, seen: fold(load(at, seen), seen),
      )


def _visit(low, high, block: int, fold):
  """Runs `fold(rows, seen)` for a whole tile, or for its visible sub-tiles."""
  whole = (low == 0) & (high == block)

  @pl.when(whole)
  def _whole():
    fold(pl.ds(0, block), None)

  @pl.when(jnp.logical_not(whole) & (low < high))
  def _boundary():
    size = 2 * LANES if block % (2 * LANES) == 0 else LANES

    def sub_tile(j, _):
      start = pl.multiple_of(j * size, size)
      fold(pl.ds(start, size), _Seen(low - start, high - start, size))
      return 0

    first = jax.lax.div(low, jnp.int32(size))
    stop = jax.lax.div(high + (size - 1), jnp.int32(size))
    jax.lax.fori_loop(first, stop, sub_tile, 0)


def _load(ref, at, seen):
  """Reads rows of a tile; what is not visible becomes 0."""
  if ref is None:
    return None
  x = ref[at, :]
  return x if seen is None else jnp.where(seen.along(0), x, jnp.zeros_like(x))


def _add(ref, decay, term):
  """Sets ref = decay ref + term; no decay is 1, no term is 0."""
  old = ref[...]
  if decay is not None:
    old = old * _widen(decay, old.shape[1])
  ref[...] = old if term is None else old + term


def _add_rows(ref, at, seen, term):
  """Adds to the visible rows of a tile alone."""
  new = ref[at, :] + term
  ref[at, :] = (
    new if seen is None else jnp.where(seen.along(0), new, ref[at, :])
  )


def _column(row):
  """A row [1, block_q] as a column with equal lanes [block_q, 128]."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _widen(x, width: int):
  """Repeats lanes: [block_q, 128] to [block_q, width]."""
  return jnp.concatenate([x] * (width // LANES), 1)


def _lane_sums(x):
  """Sums [block_q, width] to one part a lane, [block_q, 128]."""
  parts = [x[:, at : at + LANES] for at in range(0, x.shape[1], LANES)]
  return sum(parts[1:], parts[0])


def _dot(a, b):
  """Multiplies, summing in float32; float32 operands in full precision."""
  return _product(a, b, ((1,), (0,)))


def _dot_nt(a, b):
  """Multiplies by the transpose of `b`."""
  return _product(a, b, ((1,), (1,)))


def _product(a, b, contract):
  full = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (contract, ((), ())),
    precision=jax.lax.Precision.HIGHEST if full else None,
    preferred_element_type=jnp.float32,
  )
