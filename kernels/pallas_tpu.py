"""The backend "pallas_tpu": attention kernels for TPUs, written with Pallas.

Products of a visited tile (query tile times key tile):

    forward             q k, p v                    2
      + tangent of q    tq k, (p ts) v              4
      + of k and v      q tk, p tv                  6
    linear              the same without p v
    cotangent of q      q k, do v, ds k             3
    of k and v          k q, p do, v do, ds q       4

Those with tangents that are zero at trace time, or for cotangents that nobody
wants, do not exist. Tiles outside the mask are never visited, tiles inside are
not masked. Sums live in VMEM in float32; memory grows with queries plus keys.

`pallas_tpu_layout` cuts arrays into tiles, `pallas_tpu_plan` lists the tiles to
visit, `pallas_tpu_kernels` computes them; here they meet.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from crcm_jax.kernels import pallas_tpu_kernels as bodies
from crcm_jax.kernels import pallas_tpu_plan as plan
from crcm_jax.kernels.backend import Operands, Problem, Tangents
from crcm_jax.kernels.mask import BlockMask
from crcm_jax.kernels.pallas_tpu_kernels import (
  Columns,
  Keys,
  Outputs,
  Queries,
  Sums,
)
from crcm_jax.kernels.pallas_tpu_layout import (
  key_block,
  LANES,
  Layout,
  QueryTiles,
  SUBLANES,
  Tiled,
)
from crcm_jax.kernels.pallas_tpu_plan import OUT, READ

WIDEST = 256
DTYPES = ("bfloat16", "float32")
MOST_STEPS = 16 * 1024  # half a MiB of scalar memory, which holds one


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuBlocks:
  """Most tokens in a tile; tiles shrink to fit mask rows and short arrays.

  Attributes:
    queries: Of output and tangent, and of the cotangent of q.
    keys: The same.
    dkv_queries: Of the cotangents of keys and values.
    dkv_keys: The same.
  """

  queries: int = 2048
  keys: int = 512
  dkv_queries: int = 2048
  dkv_keys: int = 512

  def __post_init__(self):
    for name, size in dataclasses.asdict(self).items():
      if size < LANES or size % LANES:
        raise ValueError(
          f"`{name}` must be a positive multiple of {LANES}, the lanes of a "
          f"TPU register; got {size}."
        )


@dataclasses.dataclass(frozen=True)
class PallasTpu:
  """TPU kernels for bfloat16 and float32, for heads of up to 256 channels.

  Attributes:
    blocks: Sizes of tiles.
    interpret: True or a `pltpu.InterpretParams` runs the kernels on a CPU.
    vmem_limit_bytes: What a kernel may take of the chip's VMEM; None: 48 MiB,
      or 60 MiB for float32 heads wider than 128 (chips have 64 or 128).
  """

  blocks: TpuBlocks = TpuBlocks()
  interpret: Any = False
  vmem_limit_bytes: int | None = None
  name: str = "pallas_tpu"
  platforms: tuple[str, ...] = ("tpu",)

  def supports(self, problem: Problem, x: Operands) -> None:
    """Refuses other dtypes, wider heads, and what has no or too many tiles."""
    if x.q.dtype.name not in DTYPES:
      raise NotImplementedError(
        f"it computes in {' or '.join(DTYPES)}, not in {x.q.dtype}"
      )
    if x.q.shape[-1] > WIDEST:
      raise NotImplementedError(
        f"its heads have at most {WIDEST} channels, not {x.q.shape[-1]}"
      )
    steps = self._most_steps(problem, x)
    if steps > MOST_STEPS:
      raise NotImplementedError(
        f"its list of {steps} pairs of tiles exceeds the {MOST_STEPS} that fit "
        f"a TPU's scalar memory; `TpuBlocks` sets larger tiles"
      )

  def tables(self, problem: Problem, x: Operands) -> tuple[Array, ...]:
    """Returns the steps of `attend` and `dq`, then of `dkv` for each pair."""
    lengths = tuple(k.shape[1] for k in x.keys[problem.ranged :])
    return tuple(map(jnp.asarray, _tables(self.blocks, problem.mask, lengths)))

  def forward(self, problem: Problem, x: Operands) -> tuple[Array, Array]:
    """Computes `o` and `lse`."""
    zero = (None,) * problem.pairs
    out = self._attend("forward", problem, x, Tangents(None, zero, zero))
    return out.o, out.lse

  def fused(
    self, problem: Problem, x: Operands, t: Tangents
  ) -> tuple[Array, Array, Array]:
    """Computes `o`, `lse` and `to` in one pass."""
    out = self._attend("fused", problem, x, t)
    return out.o, out.lse, out.to

  def linear(
    self, problem: Problem, x: Operands, o: Array, lse: Array, t: Tangents
  ) -> Array:
    """Computes `to`: the fused pass without the product p v."""
    return self._attend("linear", problem, x, t, o, lse).to

  def backward(
    self,
    problem: Problem,
    x: Operands,
    o: Array,
    lse: Array,
    do: Array,
    wanted: Sequence[bool],
  ) -> list[Array]:
    """Computes the wanted cotangents: one kernel for q, one for each pair."""
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)
    statistics = dict(do=do, lse=lse, delta=delta.swapaxes(1, 2))
    grads = [self._dq(problem, x, statistics)] if wanted[0] else []
    for pair in range(problem.pairs):
      asked = wanted[1 + 2 * pair : 3 + 2 * pair]
      if any(asked):
        grads += self._dkv(problem, x, statistics, pair, asked)
    return grads

  def _attend(
    self, name, problem: Problem, x: Operands, t: Tangents, o=None, lse=None
  ) -> Outputs:
    """Runs `attend`; a given `o` and `lse` are not computed again."""
    tiles = _query_tiles(self.blocks, problem.mask)
    at = Layout(x.q, tiles, OUT)
    fresh = lse is None
    mixes = any(a is not None for a in (t.q, *t.keys))
    moves = any(a is not None for a in t.values)
    row, column = _scratch(tiles.size, at.width), _scratch(tiles.size, LANES)
    o_, lse_, to = self._launch(
      name,
      functools.partial(bodies.attend, scale=problem.scale),
      self._attend_steps(problem, x, tiles),
      cost=_cost(problem, x, _attend_products(t, fresh)),
      inputs=(
        Queries(*map(at.queries, (x.q, t.q, o)), lse=at.statistics(lse)),
        self._pairs(at, x, t),
      ),
      outputs=Outputs(
        o=at.new_queries() if fresh else None,
        lse=at.new_statistics() if fresh else None,
        to=at.new_queries() if mixes or moves else None,
      ),
      sums=Sums(
        m=column,
        total=column if fresh else None,
        acc=row if fresh else None,
        r=column if mixes else None,
        mixed=row if mixes else None,
        moved=row if moves else None,
      ),
    )
    return Outputs(
      o=at.read_queries(o_) if fresh else None,
      lse=at.read_statistics(lse_) if fresh else None,
      to=at.read_queries(to) if mixes or moves else None,
    )

  def _dq(self, problem: Problem, x: Operands, statistics) -> Array:
    tiles = _query_tiles(self.blocks, problem.mask)
    at = Layout(x.q, tiles, OUT)
    zero = (None,) * problem.pairs
    row, column = _scratch(tiles.size, at.width), _scratch(tiles.size, LANES)
    dq = self._launch(
      "dq",
      functools.partial(bodies.dq, scale=problem.scale),
      self._attend_steps(problem, x, tiles),
      cost=_cost(problem, x, (3,) * problem.pairs),
      inputs=(
        _backward_queries(at, **statistics),
        self._pairs(at, x, Tangents(None, zero, zero)),
      ),
      outputs=at.new_queries(),
      sums=Columns(lse=column, delta=column, acc=row),
    )
    return at.read_queries(dq)

  def _dkv(
    self, problem: Problem, x: Operands, statistics, pair: int, asked
  ) -> list[Array]:
    tiles = _dkv_query_tiles(self.blocks, problem.mask)
    at = Layout(x.q, tiles, READ)
    z = x.keys[pair].shape[1]
    size = key_block(self.blocks.dkv_keys, z)
    of_asked = lambda a: Keys(*(a if want else None for want in asked))
    products = [0] * problem.pairs
    products[pair] = 1 + 2 * asked[0] + asked[1]
    grads = self._launch(
      "dkv",
      functools.partial(bodies.dkv, scale=problem.scale),
      self._dkv_steps(problem, x, pair, tiles),
      cost=_cost(problem, x, products),
      inputs=(
        _backward_queries(at, **statistics),
        Keys(
          at.keys(x.keys[pair], size, OUT),
          at.keys(x.values[pair], size, OUT) if asked[0] else None,
        ),
      ),
      outputs=of_asked(at.new_keys(z, size, OUT)),
      sums=of_asked(_scratch(size, at.width)),
    )
    return [at.read_keys(g, z) for g in grads if g is not None]

  def _pairs(self, at: Layout, x: Operands, t: Tangents) -> tuple[Keys, ...]:
    """All pairs with their tangents, cut into tiles."""
    pairs = zip(x.keys, x.values, t.keys, t.values, strict=True)
    return tuple(
      Keys(
        *(
          at.keys(a, key_block(self.blocks.keys, pair[0].shape[1]), READ + i)
          for a in pair
        )
      )
      for i, pair in enumerate(pairs)
    )

  def _attend_steps(self, problem: Problem, x: Operands, tiles: QueryTiles):
    """The table of `attend` and `dq`, and its number of steps."""
    if x.ranges is None:
      return x.tables[0], x.tables[0].shape[1] - 1
    y = x.keys[0].shape[1]
    size = key_block(self.blocks.keys, y)
    return plan.ranged_attend_table(x.tables[0], x.ranges, tiles.count, y, size)

  def _dkv_steps(self, problem: Problem, x: Operands, pair: int, tiles):
    """The table of `dkv` for a pair, and its number of steps."""
    if x.ranges is not None and pair == 0:
      y = x.keys[0].shape[1]
      size = key_block(self.blocks.dkv_keys, y)
      return plan.ranged_dkv_table(x.ranges, tiles.count, y, size)
    table = x.tables[1 + pair - problem.ranged]
    return table, table.shape[1] - 1

  def _most_steps(self, problem: Problem, x: Operands) -> int:
    """The length of the longest table."""
    lengths = tuple(k.shape[1] for k in x.keys)
    tables = _tables(self.blocks, problem.mask, lengths[problem.ranged :])
    steps = max(table.shape[1] for table in tables)
    if x.ranges is not None:
      tiles = _query_tiles(self.blocks, problem.mask).count
      context = -(-lengths[0] // min(self.blocks.keys, self.blocks.dkv_keys))
      steps += tiles * len(x.ranges) * context
    return steps

  def _launch(self, name, body, steps, *, cost, inputs, outputs, sums):
    """Runs a kernel over a grid of (batch, heads, steps)."""
    table, count = steps
    q = inputs[0].q  # every kernel reads queries first
    batch, _, channels = q.array.shape
    width = q.spec.block_shape[-1]
    heads = channels // width
    wide = width * q.array.dtype.itemsize > 512
    arrays, in_specs = _unzip(inputs)
    shapes, out_specs = _unzip((outputs,))
    return pl.pallas_call(
      body,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, heads, count),
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=(sums,),
      ),
      out_shape=shapes,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=self.vmem_limit_bytes or (60 if wide else 48) * 2**20,
      ),
      cost_estimate=cost,
      interpret=self.interpret,
      name=f"attention_{name}",
    )(table, *arrays)[0]


def _attend_products(t: Tangents, fresh: bool) -> list[int]:
  """Products over a tile of each pair, as the table above counts them."""
  products = []
  for tk, tv in zip(t.keys, t.values, strict=True):
    scores = (t.q is not None) + (tk is not None)
    mixed = scores > 0
    products.append(1 + fresh + scores + mixed + (tv is not None))
  return products


def _cost(
  problem: Problem, x: Operands, products: Sequence[int]
) -> pl.CostEstimate:
  """What a kernel takes; run-time ranges are assumed to show everything."""
  b, s, n, d = x.q.shape
  lengths = [k.shape[1] for k in x.keys]
  pairs = problem.mask.visible_pairs(lengths[problem.ranged :])
  if problem.ranged:
    pairs.insert(0, s * lengths[0])
  tokens = 2 * s + 2 * sum(lengths)
  return pl.CostEstimate(
    flops=2 * b * n * d * int(np.dot(pairs, products)),
    transcendentals=b * n * int(np.dot(pairs, np.sign(products))),
    bytes_accessed=tokens * b * n * d * x.q.dtype.itemsize,
  )


def _backward_queries(at: Layout, do, lse, delta) -> Queries:
  """What the backward reads of queries."""
  return Queries(
    at.queries(at.q),
    do=at.queries(do),
    lse=at.statistics(lse),
    delta=at.statistics(delta),
  )


def _scratch(rows: int, lanes: int):
  return pltpu.VMEM((rows, lanes), jnp.float32)


def _unzip(tree):
  """Arrays and specs of a tree of `Tiled`."""
  leaf = lambda a: isinstance(a, Tiled)
  return tuple(
    jax.tree.map(lambda a, name=name: getattr(a, name), tree, is_leaf=leaf)
    for name in ("array", "spec")
  )


def _query_tiles(blocks: TpuBlocks, mask: BlockMask) -> QueryTiles:
  return QueryTiles.of(mask, blocks.queries, SUBLANES)


def _dkv_query_tiles(blocks: TpuBlocks, mask: BlockMask) -> QueryTiles:
  """In `dkv` queries lie along lanes."""
  return QueryTiles.of(mask, blocks.dkv_queries, LANES)


@functools.lru_cache(maxsize=64)
def _tables(
  blocks: TpuBlocks, mask: BlockMask, lengths: tuple[int, ...]
) -> tuple[np.ndarray, ...]:
  """The tables of a mask, in NumPy."""
  tiles, dkv_tiles = _query_tiles(blocks, mask), _dkv_query_tiles(blocks, mask)
  keys = [key_block(blocks.keys, z) for z in lengths]
  dkv_keys = [key_block(blocks.dkv_keys, z) for z in lengths]
  return (
    plan.attend_table(mask, lengths, tiles, keys),
    *(
      plan.dkv_table(mask, lengths, pair, dkv_tiles, size)
      for pair, size in enumerate(dkv_keys)
    ),
  )
