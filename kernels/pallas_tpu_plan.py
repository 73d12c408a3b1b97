"""Which tiles the TPU kernels visit, and in which order.

A kernel runs one grid step for each visited pair (query tile, key tile), listed
in an int32 table `[fields, steps + 1]`. Step i adds to the output tile
`table[OUT, i]`; a last column with output tile -1 ends the table:

    OUT        the tile that is accumulated: of queries, or in `dkv` of keys
    PAIR       which (keys, values) pair is read
    LOW, HIGH  the visible keys of the tile; equal: the step reads nothing
    READ + i   the tile of pair i that is loaded (in `dkv`: of queries)

Steps of one output tile follow each other, and each output tile has a step.
Tables of a static mask are made by NumPy while tracing, those of run-time
ranges by the program itself.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from crcm_jax.kernels.mask import BlockMask
from crcm_jax.kernels.pallas_tpu_layout import QueryTiles

OUT, PAIR, LOW, HIGH, READ = range(5)


def attend_table(
  mask: BlockMask,
  lengths: Sequence[int],
  tiles: QueryTiles,
  blocks: Sequence[int],
) -> np.ndarray:
  """Lists the key tiles of each query tile.

  Args:
    mask: The mask.
    lengths: Tokens of each key array, together `mask.num_keys`.
    tiles: Of the queries.
    blocks: Size of the key tiles of each key array.

  Returns:
    The table, with a field READ + i for each key array.
  """
  steps, tile, read = [], 0, [0] * len(lengths)
  for row, count in zip(mask.rows, tiles.counts, strict=True):
    visited = []
    split = mask.split(row, lengths)
    for pair, (spans, block) in enumerate(zip(split, blocks, strict=True)):
      for j, low, high in _cut(spans, block):
        read[pair] = j
        visited.append((pair, low, high, *read))
    visited = visited or [(0, 0, 0, *read)]
    steps += [(tile + i, *step) for i in range(count) for step in visited]
    tile += count
  return _table(steps, READ + len(lengths))


def dkv_table(
  mask: BlockMask,
  lengths: Sequence[int],
  pair: int,
  tiles: QueryTiles,
  block: int,
) -> np.ndarray:
  """Lists the query tiles that see each tile of one key array.

  Args:
    mask: The mask.
    lengths: Tokens of each key array, together `mask.num_keys`.
    pair: Which of the key arrays.
    tiles: Of the queries.
    block: Size of the key tiles.

  Returns:
    The table.
  """
  seen = [[] for _ in range(-(-lengths[pair] // block))]
  tile = 0
  for row, count in zip(mask.rows, tiles.counts, strict=True):
    for j, low, high in _cut(mask.split(row, lengths)[pair], block):
      seen[j] += [(j, 0, low, high, tile + i) for i in range(count)]
    tile += count
  return _table(
    [s for j, steps in enumerate(seen) for s in steps or [(j, 0, 0, 0, 0)]],
    READ + 1,
  )


def ranged_attend_table(
  own: Int[Array, "fields steps"],
  ranges: Int[Array, "r 2"],
  tiles: int,
  length: int,
  block: int,
) -> tuple[Int[Array, "more_fields more_steps"], Int[Array, ""]]:
  """Puts the context tiles that run-time ranges show before each tile's own.

  Args:
    own: From `attend_table`, about the own keys (without any, about none).
    ranges: What of the context all queries see.
    tiles: Number of query tiles.
    length: Tokens of the context.
    block: Size of the context's tiles.

  Returns:
    The table and its number of steps, which grows with the ranges.
  """
  own = own[:, :-1]
  j, low, high = _visible(ranges, length, block)  # each [r * j]
  tile = jnp.repeat(jnp.arange(tiles, dtype=jnp.int32), len(j))
  j, low, high = (jnp.tile(a, tiles) for a in (j, low, high))
  last = jnp.where(low < high, j, 0).max()
  context = [tile, 0 * tile, low, high, j]
  mine = [*own[:READ], jnp.broadcast_to(last, own[OUT].shape)]
  if len(own) > READ:  # there are own keys
    mine[PAIR] = mine[PAIR] + 1
    context.append(own[READ][jnp.searchsorted(own[OUT], tile)])
    mine.append(own[READ])
  steps = jnp.concatenate([jnp.stack(context), jnp.stack(mine)], 1)
  keep = jnp.concatenate([low < high, jnp.ones(own.shape[1], bool)])
  return _compact(steps, keep, jnp.where(keep, steps[OUT], tiles))


def ranged_dkv_table(
  ranges: Int[Array, "r 2"], tiles: int, length: int, block: int
) -> tuple[Int[Array, "fields steps"], Int[Array, ""]]:
  """Lists the query tiles for each context tile that run-time ranges show.

  Args:
    ranges: What of the context all queries see.
    tiles: Number of query tiles.
    length: Tokens of the context.
    block: Size of the context's tiles.

  Returns:
    The table and its number of steps.
  """
  j, low, high = _visible(ranges, length, block)
  j, low, high = (jnp.repeat(a, tiles) for a in (j, low, high))
  query = jnp.tile(jnp.arange(tiles, dtype=jnp.int32), len(j) // tiles)
  every = jnp.arange(-(-length // block), dtype=jnp.int32)  # to write its zeros
  empty = jnp.stack([every, *[0 * every] * READ])
  steps = jnp.concatenate([empty, jnp.stack([j, 0 * j, low, high, query])], 1)
  keep = jnp.concatenate([every >= 0, low < high])
  return _compact(steps, keep, jnp.where(keep, steps[OUT], len(every)))


def _cut(spans, block: int):
  """Yields (tile, low, high) for each aligned tile that a span touches."""
  for start, stop in spans:
    for j in range(start // block, -(-stop // block)):
      yield j, max(start - j * block, 0), min(stop - j * block, block)


def _visible(ranges, length: int, block: int):
  """(tile, low, high) for every range and tile; low >= high: not touched."""
  j = jnp.arange(-(-length // block), dtype=jnp.int32)
  cut = jnp.clip(ranges[:, :, None] - j[None, None] * block, 0, block)
  every = jnp.broadcast_to(j, cut[:, 0].shape)
  return every.ravel(), cut[:, 0].ravel(), cut[:, 1].ravel()


def _table(steps, fields: int) -> np.ndarray:
  table = np.zeros((fields, len(steps) + 1), np.int32)
  table[:, :-1] = np.array(steps, np.int32).T
  table[OUT, -1] = -1
  return table


def _compact(steps, keep, order):
  """Sorts the kept steps to the front and ends the table after them."""
  steps = steps.at[OUT].set(jnp.where(keep, steps[OUT], -1))
  steps = steps[:, jnp.argsort(order, stable=True)]
  return jnp.pad(steps, ((0, 0), (0, 1)), constant_values=-1), keep.sum(
    dtype=jnp.int32
  )
