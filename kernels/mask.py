"""Which keys a query sees, as ranges of tokens.

A mask is a tuple of rows. The queries of one row see the same few ranges of
keys, and keys are ordered `[context | own]`. Nothing here grows with
queries times keys: block-causal and teacher-forcing masks have one row a chunk.

Chunk `a` of a block-causal sequence sees the chunks `b <= a` that lie in its
window, `b > a - window`, or among the sinks, `b < sink`. With teacher forcing
a noisy chunk sees the clean chunks `b < a` of that set, and itself.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

Range: TypeAlias = tuple[int, int]
"""Tokens `start <= token < stop`."""


class Row(NamedTuple):
  """Queries that see the same keys."""

  queries: Range
  keys: tuple[Range, ...]  # disjoint, ascending; none: the queries see nothing


class TileTable(NamedTuple):
  """Query tiles and the key ranges of each, for kernels."""

  queries: np.ndarray  # int32 [tiles, 2], (start, stop)
  keys: tuple[np.ndarray, ...]  # one a key array: int32 [tiles, ranges, 2]


@dataclasses.dataclass(frozen=True)
class BlockMask:
  """A hashable attention mask: rows of (query range, key ranges).

  Attributes:
    rows: They cover the queries from 0, in order and without gaps.
    num_keys: How many keys the mask is about, `[context | own]`.

  Example:
    >>> mask = BlockMask.block_causal((0, 2, 3))
    >>> mask.dense().astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [1, 1, 1]])
  """

  rows: tuple[Row, ...]
  num_keys: int

  def __post_init__(self):
    end = 0
    for (start, stop), keys in self.rows:
      if start != end or stop < start:
        raise ValueError(
          f"`rows` must cover the queries in order without gaps; the row "
          f"({start}, {stop}) follows query {end}. Add a row without keys for "
          f"queries that see nothing."
        )
      end = stop
      flat = list(itertools.chain((0,), *keys, (self.num_keys,)))
      if flat != sorted(flat):
        raise ValueError(
          f"`keys` of a row must be disjoint ascending ranges within "
          f"(0, {self.num_keys}); got {keys}."
        )

  @property
  def num_queries(self) -> int:
    """How many queries the mask is about."""
    return self.rows[-1].queries[1] if self.rows else 0

  @classmethod
  def full(cls, queries: int, keys: int) -> "BlockMask":
    """Lets every query see every key."""
    return cls((Row((0, queries), _merge([(0, keys)])),), keys)

  @classmethod
  def block_causal(
    cls,
    boundaries: Sequence[int],
    *,
    window: int | None = None,
    sink: int = 0,
    query_chunk: int | None = None,
  ) -> "BlockMask":
    """Lets every chunk see itself and the chunks before it.

    Args:
      boundaries: First token of each chunk, then the number of tokens, as from
        `ChunkPattern.token_boundaries`: `(0, 16, 64)` is two chunks.
      window: How many chunks a query sees, its own included; None is all.
      sink: How many first chunks stay visible beyond the window.
      query_chunk: Only this chunk asks, over the keys of the chunks up to and
        including it. None: all chunks ask.

    Returns:
      The mask.

    Raises:
      ValueError: Boundaries that do not ascend from 0, a window or a chunk out
        of range.
    """
    spans = _spans(boundaries, window, sink)
    if query_chunk is None:
      rows = [
        Row(span, _merge(spans[b] for b in _visible(a, window, sink)))
        for a, span in enumerate(spans)
      ]
      return cls(tuple(rows), spans[-1][1])
    if not 0 <= query_chunk < len(spans):
      raise ValueError(
        f"`query_chunk` must be one of the {len(spans)} chunks, 0 to "
        f"{len(spans) - 1}; got {query_chunk}."
      )
    start, stop = spans[query_chunk]
    keys = _merge(spans[b] for b in _visible(query_chunk, window, sink))
    return cls((Row((0, stop - start), keys),), stop)

  @classmethod
  def noisy_rows(
    cls,
    boundaries: Sequence[int],
    *,
    window: int | None = None,
    sink: int = 0,
  ) -> "BlockMask":
    """Lets noisy chunks see earlier clean chunks and themselves.

    The keys are `[clean | noisy]`: the noisy stream of teacher forcing, with
    the clean one as context.

    Args:
      boundaries: As for `block_causal`, of one stream.
      window: How many chunks a query sees, its own included; None is all.
      sink: How many first clean chunks stay visible beyond the window.

    Returns:
      The mask, `[tokens, 2 tokens]`.

    Raises:
      ValueError: As `block_causal`.
    """
    spans = _spans(boundaries, window, sink)
    tokens = spans[-1][1]
    rows = []
    for a, (start, stop) in enumerate(spans):
      clean = [spans[b] for b in _visible(a, window, sink) if b < a]
      rows.append(
        Row((start, stop), _merge([*clean, (tokens + start, tokens + stop)]))
      )
    return cls(tuple(rows), 2 * tokens)

  @classmethod
  def teacher_forcing(
    cls,
    boundaries: Sequence[int],
    *,
    window: int | None = None,
    sink: int = 0,
  ) -> "BlockMask":
    """Packs both streams of teacher forcing into one `[clean | noisy]` square.

    Clean chunks are block causal, noisy ones see as in `noisy_rows`.

    Args:
      boundaries: As for `block_causal`, of one stream.
      window: How many chunks a query sees, its own included; None is all.
      sink: How many first clean chunks stay visible beyond the window.

    Returns:
      The mask, `[2 tokens, 2 tokens]`.

    Raises:
      ValueError: As `block_causal`.
    """
    clean = cls.block_causal(boundaries, window=window, sink=sink)
    noisy = cls.noisy_rows(boundaries, window=window, sink=sink)
    tokens = clean.num_queries
    moved = tuple(
      Row((start + tokens, stop + tokens), keys)
      for (start, stop), keys in noisy.rows
    )
    return cls(clean.rows + moved, noisy.num_keys)

  def dense(self) -> np.ndarray:
    """Returns booleans `[queries, keys]`, for tests and pictures."""
    visible = np.zeros((self.num_queries, self.num_keys), bool)
    for (start, stop), keys in self.rows:
      for first, last in keys:
        visible[start:stop, first:last] = True
    return visible

  def shard_rows(self, n: int) -> tuple["BlockMask", ...]:
    """Deals the queries out to `n` devices, one token at a time.

    Device `i` holds the queries `i, i + n, i + 2 n, ...`, so that every device
    gets an equal part of every row: the work is balanced whatever the mask.
    Where all rows divide by `n` the masks are equal, one static program.

    Args:
      n: Number of devices.

    Returns:
      The mask of each device, over all keys.

    Raises:
      ValueError: Queries that do not divide by `n`.
    """
    if self.num_queries % n:
      raise ValueError(
        f"`n` must divide the {self.num_queries} queries; got {n}. Pad the "
        f"queries with a row without keys."
      )
    # Local token j is token i + n j, so local index = ceil((token - i) / n).
    local = lambda token, i: -((i - token) // n)
    return tuple(
      BlockMask(
        tuple(
          Row((local(start, i), local(stop, i)), keys)
          for (start, stop), keys in self.rows
        ),
        self.num_keys,
      )
      for i in range(n)
    )

  def split(self, row: Row, lengths: Sequence[int]) -> list[list[Range]]:
    """Returns the key ranges of a row inside each of the key arrays.

    Args:
      row: One of the rows.
      lengths: Tokens of each key array, together `num_keys`.
    """
    offsets = list(itertools.accumulate(lengths, initial=0))
    parts = []
    for low, high in itertools.pairwise(offsets):
      cut = [(max(a, low) - low, min(b, high) - low) for a, b in row.keys]
      parts.append([(a, b) for a, b in cut if a < b])
    return parts

  def transposed(self, lengths: Sequence[int]) -> tuple["BlockMask", ...]:
    """Returns which queries see each key: a mask over each key array.

    Args:
      lengths: Tokens of each key array, together `num_keys`.

    Returns:
      Masks whose rows are runs of keys that the same queries see, and whose
      keys are those queries.
    """
    masks = []
    for i, length in enumerate(lengths):
      seen = [(r.queries, self.split(r, lengths)[i]) for r in self.rows]
      edges = {0, length, *itertools.chain(*(e for _, s in seen for e in s))}
      rows = [
        Row(
          (start, stop),
          _merge(
            queries
            for queries, spans in seen
            if any(low <= start < high for low, high in spans)
          ),
        )
        for start, stop in itertools.pairwise(sorted(edges))
      ]
      masks.append(BlockMask(tuple(rows), self.num_queries))
    return tuple(masks)

  def visible_pairs(self, lengths: Sequence[int]) -> list[int]:
    """Returns how many (query, key) pairs are visible in each key array.

    Args:
      lengths: Tokens of each key array, together `num_keys`.
    """
    pairs = [0] * len(lengths)
    for row in self.rows:
      queries = row.queries[1] - row.queries[0]
      for i, spans in enumerate(self.split(row, lengths)):
        pairs[i] += queries * sum(stop - start for start, stop in spans)
    return pairs

  def tile_size(self, block: int) -> int:
    """Returns the most even tile of at most `block` queries for the rows."""
    longest = max(stop - start for (start, stop), _ in self.rows)
    return -(-longest // -(-longest // block))

  def tile_table(self, block: int, lengths: Sequence[int]) -> TileTable:
    """Cuts every row into query tiles of at most `tile_size(block)`.

    Args:
      block: Most queries in a tile.
      lengths: Tokens of each key array, together `num_keys`.

    Returns:
      The tiles with their key ranges, padded by empty ranges `(0, 0)`.
    """
    size = self.tile_size(block)
    tiles = [
      ((at, min(at + size, row.queries[1])), self.split(row, lengths))
      for row in self.rows
      for at in range(*row.queries, size)
    ]
    return TileTable(
      np.array([queries for queries, _ in tiles], np.int32),
      tuple(
        _padded([parts[i] for _, parts in tiles]) for i in range(len(lengths))
      ),
    )


def _visible(a: int, window: int | None, sink: int) -> list[int]:
  """Chunks up to `a` that chunk `a` sees."""
  return [
    b for b in range(a + 1) if window is None or b > a - window or b < sink
  ]


def _merge(ranges: Iterable[Range]) -> tuple[Range, ...]:
  """Joins ascending ranges that touch and drops empty ones."""
  merged: list[Range] = []
  for start, stop in ranges:
    if merged and merged[-1][1] == start:
      merged[-1] = (merged[-1][0], stop)
    elif start < stop:
      merged.append((start, stop))
  return tuple(merged)


def _padded(parts: Sequence[Sequence[Range]]) -> np.ndarray:
  """Ranges of each tile as one int32 array `[tiles, ranges, 2]`."""
  table = np.zeros((len(parts), max(map(len, parts)), 2), np.int32)
  for i, ranges in enumerate(parts):
    for j, span in enumerate(ranges):
      table[i, j] = span
  return table


def _spans(
  boundaries: Sequence[int], window: int | None, sink: int
) -> list[Range]:
  """First and last token of each chunk, after checking the arguments."""
  spans = list(itertools.pairwise(map(int, boundaries)))
  if (
    not spans
    or boundaries[0] != 0
    or any(start >= stop for start, stop in spans)
  ):
    raise ValueError(
      f"`boundaries` must ascend from 0 to the number of tokens, such as "
      f"(0, 16, 64); got {tuple(boundaries)}. "
      f"`ChunkPattern.token_boundaries` makes them."
    )
  if window is not None and window < 1:
    raise ValueError(
      f"`window` counts chunks, the query's own included, so it must be at "
      f"least 1; got {window}. Use None for no window."
    )
  if sink < 0:
    raise ValueError(f"`sink` must be at least 0 chunks; got {sink}.")
  return spans
