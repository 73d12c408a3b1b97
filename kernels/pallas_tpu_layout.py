"""How attention's arrays are cut into tiles for the TPU kernels.

Arrays enter a kernel as `[b s (n d)]`, which is `[b s n d]` as it lies in
memory: a head is a column of whole 128-lane tiles, read by strided copies, and
no array is transposed. Narrower heads are padded to 128 lanes.

Queries are padded row by row of the mask, so that all queries of a tile see the
same keys; keys stay where they are. A grid is (b, n, steps), and which tile of
an array a step reads or writes stands in a field of its table (see
`pallas_tpu_plan`).
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from crcm_jax.kernels._compat import struct_like
from crcm_jax.kernels.mask import BlockMask

LANES = 128
SUBLANES = 16  # of bfloat16; float32 has 8
_OVERHEAD = 64  # what a query tile costs besides its queries, in queries


def round_up(size: int, multiple: int) -> int:
  """Rounds `size` up to a multiple."""
  return -(-size // multiple) * multiple


def key_block(block: int, length: int) -> int:
  """Returns the size of key tiles: `block`, or less for a short array."""
  return min(block, round_up(length, LANES))


@dataclasses.dataclass(frozen=True)
class Tiled:
  """An array, or the type of one to be made, and how it is cut."""

  array: Any
  spec: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class QueryTiles:
  """Queries padded so that no tile holds queries of two rows of a mask.

  Attributes:
    rows: Queries of each row.
    size: Queries of a tile.
  """

  rows: tuple[int, ...]
  size: int

  @classmethod
  def of(cls, mask: BlockMask, block: int, multiple: int) -> "QueryTiles":
    """Chooses the size, at most `block`, that costs the least.

    Args:
      mask: Its rows are padded.
      block: Most queries in a tile.
      multiple: The size is a multiple of this.
    """
    rows = tuple(stop - start for (start, stop), _ in mask.rows)
    most = min(block, round_up(max(rows), multiple))
    least = min(most, round_up(most // 2, multiple))
    sizes = range(most, least - 1, -multiple)
    cost = lambda size: sum(
      -(-row // size) * (size + _OVERHEAD) for row in rows
    )
    return cls(rows, min(sizes, key=cost))

  @property
  def counts(self) -> list[int]:
    """Tiles of each row."""
    return [-(-row // self.size) for row in self.rows]

  @property
  def count(self) -> int:
    """Tiles in all."""
    return sum(self.counts)

  @property
  def total(self) -> int:
    """Queries in all, padding included."""
    return self.count * self.size

  def pad(self, x: Float[Array, "b s w"]) -> Float[Array, "b tiles_size w"]:
    """Pads every row with zeros to whole tiles."""
    padded = [round_up(row, self.size) for row in self.rows]
    return self._resized(x, self.rows, padded)

  def unpad(self, x: Float[Array, "b tiles_size w"]) -> Float[Array, "b s w"]:
    """Takes the padding away again."""
    padded = [round_up(row, self.size) for row in self.rows]
    return self._resized(x, padded, self.rows)

  def _resized(self, x, old, new):
    """Cuts or pads rows of old sizes, equal neighbours together."""
    b, _, w = x.shape
    parts, at = [], 0
    for (before, after), group in itertools.groupby(zip(old, new, strict=True)):
      length = before * len(list(group))
      if not length:
        continue
      part = x[:, at : at + length].reshape(b, -1, before, w)
      part = jnp.pad(
        part, ((0, 0), (0, 0), (0, max(after - before, 0)), (0, 0))
      )
      parts.append(part[:, :, :after].reshape(b, -1, w))
      at += length
    return jnp.concatenate(parts, 1)


@dataclasses.dataclass(frozen=True)
class Layout:
  """The tiles of one kernel launch.

  Attributes:
    q: The queries, `[b s n d]`; all arrays have their batch, heads, width.
    tiles: Of the queries.
    field: Of the table: which query tile a step reads or writes.
  """

  q: Array
  tiles: QueryTiles
  field: int

  @property
  def width(self) -> int:
    """Lanes of a head."""
    return round_up(self.q.shape[-1], LANES)

  @property
  def heads(self) -> int:
    """Number of heads."""
    return self.q.shape[2]

  def queries(self, x: Array | None) -> Tiled | None:
    """Cuts `[b s n d]`."""
    if x is None:
      return None
    return Tiled(self.tiles.pad(self._joined(x)), self._query_spec())

  def statistics(self, x: Array | None) -> Tiled | None:
    """Cuts `[b n s]` into rows `[1, block_q]`."""
    if x is None:
      return None
    b, n, s = x.shape
    x = self.tiles.pad(x.reshape(b * n, s, 1))
    return Tiled(x.reshape(self._statistics_shape()), self._statistics_spec())

  def keys(self, x: Array | None, size: int, field: int) -> Tiled | None:
    """Cuts `[b z n d]` into tiles of `size`; `field` says which is meant."""
    if x is None:
      return None
    missing = max(size - x.shape[1], 0)
    x = jnp.pad(self._joined(x), ((0, 0), (0, missing), (0, 0)))
    return Tiled(x, self._columns_spec(size, field))

  def new_queries(self) -> Tiled:
    """Describes an output that `read_queries` reads."""
    shape = (self.q.shape[0], self.tiles.total, self.heads * self.width)
    return Tiled(struct_like(shape, self.q.dtype, self.q), self._query_spec())

  def new_statistics(self) -> Tiled:
    """Describes an output that `read_statistics` reads."""
    like = struct_like(self._statistics_shape(), jnp.float32, self.q)
    return Tiled(like, self._statistics_spec())

  def new_keys(self, length: int, size: int, field: int) -> Tiled:
    """Describes an output that `read_keys` reads."""
    shape = (self.q.shape[0], max(length, size), self.heads * self.width)
    like = struct_like(shape, self.q.dtype, self.q)
    return Tiled(like, self._columns_spec(size, field))

  def read_queries(self, x: Array) -> Array:
    """Returns an output of queries as `[b s n d]`."""
    return self._split(self.tiles.unpad(x))

  def read_statistics(self, x: Array) -> Array:
    """Returns an output of statistics as `[b n s]`."""
    b, n = x.shape[:2]
    return self.tiles.unpad(x.reshape(b * n, -1, 1)).reshape(b, n, -1)

  def read_keys(self, x: Array, length: int) -> Array:
    """Returns an output of keys as `[b z n d]`."""
    return self._split(x[:, :length])

  def _joined(self, x):
    b, s, n, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.width - d)))
    return x.reshape(b, s, n * self.width)

  def _split(self, x):
    x = x.reshape(*x.shape[:2], self.heads, self.width)
    return x[..., : self.q.shape[-1]]

  def _query_spec(self):
    return self._columns_spec(self.tiles.size, self.field)

  def _columns_spec(self, size, field):
    """Tiles [size, width]: rows as the table says, columns of the head."""
    return pl.BlockSpec(
      (None, size, self.width), lambda b, n, i, table: (b, table[field, i], n)
    )

  def _statistics_shape(self):
    b, _, n, _ = self.q.shape
    return b, n, self.tiles.count, 1, self.tiles.size

  def _statistics_spec(self):
    return pl.BlockSpec(
      (None, None, None, 1, self.tiles.size),
      lambda b, n, i, table: (b, n, table[self.field, i], 0, 0),
    )
