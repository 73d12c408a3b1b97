"""The device code of the backend "triton": three kernels, one tile a program.

    attend          a tile of queries walks over its keys: o, lse and tangent
    query_gradient  a tile of queries walks over its keys: dq
    key_gradient    a tile of keys walks over its queries: dk, dv

Tables hold the tiles, (start, stop), and what each walks over: ranges of
(start, stop) in each stream. A range is walked in whole blocks, which need no
mask, and one last block, which does. A tile never holds queries that see
different keys, so what a query does not see cannot reach it, not even as NaN.

Arrays are [b tokens n d], `lse` and `delta` [b n s]. Exponentials have base 2,
with C = scale log2(e): p = exp2(C q.k - lse / ln 2). Names in capitals are
known at compile time; HAS_TK says whether there is a tangent of the keys:
products with tangents that are zero are not in the program.

`no_type_check` keeps run-time type checkers from wrapping what Triton reads as
source.
"""

from typing import NamedTuple, no_type_check

import triton
import triton.language as tl

_LOWEST = tl.constexpr(-1e30)  # finite: the difference of two such is 0
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class Dims(NamedTuple):
  """Sizes that all arrays of a call share."""

  HEADS: tl.constexpr
  WIDTH: tl.constexpr
  BLOCK_D: tl.constexpr  # power of 2, at least WIDTH
  SCALE: tl.constexpr
  C: tl.constexpr  # SCALE log2(e)


class Walk(NamedTuple):
  """One stream that a tile walks over."""

  LENGTH: tl.constexpr  # its tokens
  RANGES: tl.constexpr  # ranges a tile; 0: there is no such stream
  BLOCK: tl.constexpr
  HAS_TK: tl.constexpr
  HAS_TV: tl.constexpr


class _Keys(NamedTuple):
  """Pointers to one head's keys, values and their tangents."""

  k: tl.tensor
  v: tl.tensor
  tk: tl.tensor
  tv: tl.tensor


class _Sums(NamedTuple):
  """Running sums of a tile of queries; m is their maximum, or lse / ln 2."""

  m: tl.tensor  # [block_q]
  total: tl.tensor  # [block_q], of p
  acc: tl.tensor  # [block_q, d], of p v
  r: tl.tensor  # [block_q], of p ts
  tacc: tl.tensor  # [block_q, d], of p tv + (p ts) v


# --- Tiles and tables ---


@triton.jit
@no_type_check
def _span(table, i):
  """The i-th (start, stop) of a table."""
  return tl.load(table + 2 * i), tl.load(table + 2 * i + 1)


@triton.jit
@no_type_check
def _head(i, LENGTH: tl.constexpr, z: tl.constexpr):
  """Where the i-th (batch element, head) begins in [b LENGTH n d]."""
  b = (i // z.HEADS).to(tl.int64)
  return b * (LENGTH * z.HEADS * z.WIDTH) + (i % z.HEADS) * z.WIDTH


@triton.jit
@no_type_check
def _at(token, z: tl.constexpr):
  """Offsets [block, d] of tokens from the beginning of their head."""
  d = tl.arange(0, z.BLOCK_D)
  return token[:, None] * (z.HEADS * z.WIDTH) + d[None, :]


@triton.jit
@no_type_check
def _inside(seen, z: tl.constexpr):
  return seen[:, None] & (tl.arange(0, z.BLOCK_D) < z.WIDTH)[None, :]


@triton.jit
@no_type_check
def _load(head, token, seen, z: tl.constexpr):
  """A tile [block, d]; 0 where a token is not seen."""
  return tl.load(head + _at(token, z), mask=_inside(seen, z), other=0.0)


@triton.jit
@no_type_check
def _load_block(head, token, seen, z: tl.constexpr, WHOLE: tl.constexpr):
  """A tile on the walk: a whole one needs no mask."""
  if WHOLE and z.WIDTH == z.BLOCK_D:
    return tl.load(head + _at(token, z))
  return _load(head, token, seen, z)


@triton.jit
@no_type_check
def _load_rows(head, token, seen, WHOLE: tl.constexpr):
  """One number a token: [block]."""
  if WHOLE:
    return tl.load(head + token)
  return tl.load(head + token, mask=seen, other=0.0)


@triton.jit
@no_type_check
def _store(head, token, seen, tile, z: tl.constexpr):
  tile = tile.to(head.dtype.element_ty)
  tl.store(head + _at(token, z), tile, mask=_inside(seen, z))


@triton.jit
@no_type_check
def _dot(a, b):
  """A product in float32 sums; float32 factors as three TF32 products each.

  Those three keep the accuracy of float32; one alone would not.
  """
  return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
@no_type_check
def _add_dot(acc, a, b):
  return tl.dot(a.to(b.dtype), b, acc, input_precision="tf32x3")


# --- attend ---


@triton.jit
@no_type_check
def _tangent_scores(
  q, tq, k, keys, key, seen,
  HAS_TQ: tl.constexpr, w: tl.constexpr, z: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
  """Scores of a block along tangents, without the products of zeros."""
  if not w.HAS_TK:
    return _dot(tq, tl.trans(k))
  tk = tl.trans(_load_block(keys.tk, key, seen, z, WHOLE))
  if not HAS_TQ:
    return _dot(q, tk)
  return _add_dot(_dot(tq, tl.trans(k)), q, tk)


@triton.jit
@no_type_check
def _attend_block(
  sums, q, tq, keys, at, stop,
  KNOWN: tl.constexpr, HAS_TQ: tl.constexpr,
  w: tl.constexpr, z: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
  """Adds one block of keys; with KNOWN, to the tangent alone."""
  m, total, acc, r, tacc = sums
  key = at + tl.arange(0, w.BLOCK)
  seen = key < stop
  k = _load_block(keys.k, key, seen, z, WHOLE)
  s = _dot(q, tl.trans(k))  # [block_q, block]
  if not WHOLE:
    s = tl.where(seen[None, :], s, _LOWEST)
  if HAS_TQ or w.HAS_TK:
    ts = _tangent_scores(q, tq, k, keys, key, seen, HAS_TQ, w, z, WHOLE)
  v = _load_block(keys.v, key, seen, z, WHOLE)
  if not KNOWN:
    new = tl.maximum(m, z.C * tl.max(s, 1))
    decay = tl.exp2(m - new)
    m, total, r = new, total * decay, r * decay
    acc, tacc = acc * decay[:, None], tacc * decay[:, None]
  p = tl.exp2(z.C * s - m[:, None])
  if not KNOWN:
    total += tl.sum(p, 1)
    acc = _add_dot(acc, p, v)
  if w.HAS_TV:
    tacc = _add_dot(tacc, p, _load_block(keys.tv, key, seen, z, WHOLE))
  if HAS_TQ or w.HAS_TK:
    pts = p * (z.SCALE * ts)
    r += tl.sum(pts, 1)
    tacc = _add_dot(tacc, pts, v)
  return _Sums(m, total, acc, r, tacc)


@triton.jit
@no_type_check
def _attend_stream(
  sums, q, tq, keys, table, tile, split,
  SPLITS: tl.constexpr, KNOWN: tl.constexpr, HAS_TQ: tl.constexpr,
  w: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
  """Walks over what the tile sees of one stream.

  Of several splits, each takes its share of a range's whole blocks, and the
  last one what is left.
  """
  for i in range(w.RANGES):
    start, stop = _span(table, tile * w.RANGES + i)
    blocks = (stop - start) // w.BLOCK
    first = start + w.BLOCK * (blocks * split // SPLITS)
    last = start + w.BLOCK * (blocks * (split + 1) // SPLITS)
    for at in tl.range(first, last, w.BLOCK):
      sums = _attend_block(
        sums, q, tq, keys, at, stop, KNOWN, HAS_TQ, w, z, True
      )
    if (last < stop) & (split == SPLITS - 1):
      sums = _attend_block(
        sums, q, tq, keys, last, stop, KNOWN, HAS_TQ, w, z, False
      )
  return sums


@triton.jit
@no_type_check
def attend(
  q, k_0, v_0, k_1, v_1, tq, tk_0, tv_0, tk_1, tv_1, known_o, known_lse,
  tiles, table_0, table_1,
  o, lse, to,
  LENGTH: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
  BLOCK_Q: tl.constexpr, HAS_TQ: tl.constexpr, KNOWN: tl.constexpr,
  w_0: tl.constexpr, w_1: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
  """Computes o, lse and to of one tile of queries; with KNOWN, to alone.

  Programs are ordered [split, batch and head, tile]: those that run together
  read the same keys. Each split writes its own [b s n d] and [b n s].
  """
  program = tl.program_id(0)
  tile, head = program % TILES, program // TILES
  split = tl.program_id(1)
  HAS_T: tl.constexpr = (
    HAS_TQ or w_0.HAS_TK or w_0.HAS_TV or w_1.HAS_TK or w_1.HAS_TV
  )

  start, stop = _span(tiles, tile)
  query = start + tl.arange(0, BLOCK_Q)
  mine = query < stop
  at_q, at_row = _head(head, LENGTH, z), head * LENGTH + query
  q_tile = _load(q + at_q, query, mine, z)
  tq_tile = q_tile
  if HAS_TQ:
    tq_tile = _load(tq + at_q, query, mine, z)

  D: tl.constexpr = z.BLOCK_D
  zeros = tl.zeros([BLOCK_Q], tl.float32)
  zeros_d = tl.zeros([BLOCK_Q, D], tl.float32)
  m = zeros + _LOWEST
  if KNOWN:
    m = tl.load(known_lse + at_row, mask=mine, other=0.0) * _LOG2_E
  sums = _Sums(m, zeros, zeros_d, zeros, zeros_d)
  if w_0.RANGES > 0:
    at = _head(head, w_0.LENGTH, z)
    keys = _Keys(k_0 + at, v_0 + at, tk_0 + at, tv_0 + at)
    sums = _attend_stream(
      sums, q_tile, tq_tile, keys, table_0, tile, split,
      SPLITS, KNOWN, HAS_TQ, w_0, z,
    )  # fmt: skip
  if w_1.RANGES > 0:
    at = _head(head, w_1.LENGTH, z)
    keys = _Keys(k_1 + at, v_1 + at, tk_1 + at, tv_1 + at)
    sums = _attend_stream(
      sums, q_tile, tq_tile, keys, table_1, tile, split,
      SPLITS, KNOWN, HAS_TQ, w_1, z,
    )  # fmt: skip

  m, total, acc, r, tacc = sums
  if KNOWN:
    o_tile = _load(known_o + at_q, query, mine, z).to(tl.float32)
    _store(to + at_q, query, mine, tacc - r[:, None] * o_tile, z)
  else:
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # 0: nothing was seen
    o_tile = acc * inverse[:, None]
    at_split = split.to(tl.int64) * (tl.num_programs(0) // TILES) * LENGTH
    at_o = at_split * z.WIDTH + at_q
    _store(o + at_o, query, mine, o_tile, z)
    row_lse = (m + tl.log2(total)) * _LN_2
    tl.store(lse + at_split + at_row, row_lse, mask=mine)
    if HAS_T:
      tangent = (tacc - r[:, None] * o_tile) * inverse[:, None]
      _store(to + at_q, query, mine, tangent, z)


# --- query_gradient ---


@triton.jit
@no_type_check
def _query_gradient_block(
  dq, q, do, lse, delta, k_head, v_head, at, stop,
  w: tl.constexpr, z: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
  """Adds ds k of one block of keys, ds = p (do v - delta)."""
  key = at + tl.arange(0, w.BLOCK)
  seen = key < stop
  k = _load_block(k_head, key, seen, z, WHOLE)
  v = _load_block(v_head, key, seen, z, WHOLE)
  s = _dot(q, tl.trans(k))  # [block_q, block]
  p = tl.exp2(z.C * s - lse[:, None])
  dp = _dot(do, tl.trans(v))
  ds = p * (dp - delta[:, None])
  if not WHOLE:
    ds = tl.where(seen[None, :], ds, 0.0)
  return _add_dot(dq, ds, k)


@triton.jit
@no_type_check
def _query_gradient_stream(
  dq, q, do, lse, delta, k, v, table, tile, w: tl.constexpr, z: tl.constexpr
):
  for i in range(w.RANGES):
    start, stop = _span(table, tile * w.RANGES + i)
    last = start + (stop - start) // w.BLOCK * w.BLOCK
    for at in tl.range(start, last, w.BLOCK):
      dq = _query_gradient_block(
        dq, q, do, lse, delta, k, v, at, stop, w, z, True
      )
    if last < stop:
      dq = _query_gradient_block(
        dq, q, do, lse, delta, k, v, last, stop, w, z, False
      )
  return dq


@triton.jit
@no_type_check
def query_gradient(
  q, k_0, v_0, k_1, v_1, do, lse, delta, tiles, table_0, table_1,
  dq,
  LENGTH: tl.constexpr, TILES: tl.constexpr, BLOCK_Q: tl.constexpr,
  w_0: tl.constexpr, w_1: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
  """Computes dq = scale ds k of one tile of queries."""
  tile, head = tl.program_id(0) % TILES, tl.program_id(0) // TILES
  start, stop = _span(tiles, tile)
  query = start + tl.arange(0, BLOCK_Q)
  mine = query < stop
  at_q, at_row = _head(head, LENGTH, z), head * LENGTH + query
  q_tile = _load(q + at_q, query, mine, z)
  do_tile = _load(do + at_q, query, mine, z)
  row_lse = tl.load(lse + at_row, mask=mine, other=0.0) * _LOG2_E
  row_delta = tl.load(delta + at_row, mask=mine, other=0.0)

  D: tl.constexpr = z.BLOCK_D
  acc = tl.zeros([BLOCK_Q, D], tl.float32)
  if w_0.RANGES > 0:
    at = _head(head, w_0.LENGTH, z)
    acc = _query_gradient_stream(
      acc, q_tile, do_tile, row_lse, row_delta, k_0 + at, v_0 + at,
      table_0, tile, w_0, z,
    )  # fmt: skip
  if w_1.RANGES > 0:
    at = _head(head, w_1.LENGTH, z)
    acc = _query_gradient_stream(
      acc, q_tile, do_tile, row_lse, row_delta, k_1 + at, v_1 + at,
      table_1, tile, w_1, z,
    )  # fmt: skip
  _store(dq + at_q, query, mine, acc * z.SCALE, z)


# --- key_gradient ---


@triton.jit
@no_type_check
def _key_gradient_block(
  dk, dv, k, v, q_head, do_head, lse_row, delta_row, at, stop,
  WANT_K: tl.constexpr, WANT_V: tl.constexpr,
  w: tl.constexpr, z: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
  """Adds p^T do and ds^T q of one block of queries.

  Queries beyond the range are loaded as 0, with do = 0: they add nothing.
  """
  query = at + tl.arange(0, w.BLOCK)
  seen = query < stop
  q = _load_block(q_head, query, seen, z, WHOLE)
  do = _load_block(do_head, query, seen, z, WHOLE)
  lse = _load_rows(lse_row, query, seen, WHOLE) * _LOG2_E
  s = _dot(k, tl.trans(q))  # [block_k, block]
  p = tl.exp2(z.C * s - lse[None, :])
  if WANT_V:
    dv = _add_dot(dv, p, do)
  if WANT_K:
    delta = _load_rows(delta_row, query, seen, WHOLE)
    ds = p * (_dot(v, tl.trans(do)) - delta[None, :])
    dk = _add_dot(dk, ds, q)
  return dk, dv


@triton.jit
@no_type_check
def _is_visible(key, mine, visible, VISIBLE: tl.constexpr):
  """Which keys of a tile run-time ranges leave visible."""
  if VISIBLE == 0:
    return mine
  seen = key < 0
  for i in tl.static_range(VISIBLE):
    start, stop = _span(visible, i)
    seen = seen | ((key >= start) & (key < stop))
  return seen & mine


@triton.jit
@no_type_check
def key_gradient(
  q, k, v, do, lse, delta, tiles, table, visible,
  dk, dv,
  LENGTH: tl.constexpr, TILES: tl.constexpr, BLOCK_K: tl.constexpr,
  VISIBLE: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
  w: tl.constexpr, z: tl.constexpr,
):  # fmt: skip
  """Computes dk = scale ds^T q and dv = p^T do of one tile of keys.

  `visible` holds VISIBLE run-time ranges of keys: the others get 0, and a tile
  of which nothing is visible walks over no queries.
  """
  tile, head = tl.program_id(0) % TILES, tl.program_id(0) // TILES
  start, stop = _span(tiles, tile)
  key = start + tl.arange(0, BLOCK_K)
  mine = key < stop
  seen = _is_visible(key, mine, visible, VISIBLE)
  any_seen = tl.max(seen.to(tl.int32), 0)
  at_k, at_q = _head(head, LENGTH, z), _head(head, w.LENGTH, z)
  k_tile = _load(k + at_k, key, seen, z)
  v_tile = _load(v + at_k, key, seen, z)
  q_head, do_head = q + at_q, do + at_q
  lse_row, delta_row = lse + head * w.LENGTH, delta + head * w.LENGTH

  D: tl.constexpr = z.BLOCK_D
  dk_acc = tl.zeros([BLOCK_K, D], tl.float32)
  dv_acc = tl.zeros([BLOCK_K, D], tl.float32)
  for i in range(w.RANGES):
    first, end = _span(table, tile * w.RANGES + i)
    end = first + (end - first) * any_seen
    last = first + (end - first) // w.BLOCK * w.BLOCK
    for at in tl.range(first, last, w.BLOCK):
      dk_acc, dv_acc = _key_gradient_block(
        dk_acc, dv_acc, k_tile, v_tile, q_head, do_head, lse_row, delta_row,
        at, end, WANT_K, WANT_V, w, z, True,
      )  # fmt: skip
    if last < end:
      dk_acc, dv_acc = _key_gradient_block(
        dk_acc, dv_acc, k_tile, v_tile, q_head, do_head, lse_row, delta_row,
        last, end, WANT_K, WANT_V, w, z, False,
      )  # fmt: skip
  if WANT_K:
    dk_acc = tl.where(seen[:, None], dk_acc * z.SCALE, 0.0)
    _store(dk + at_k, key, mine, dk_acc, z)
  if WANT_V:
    dv_acc = tl.where(seen[:, None], dv_acc, 0.0)
    _store(dv + at_k, key, mine, dv_acc, z)
