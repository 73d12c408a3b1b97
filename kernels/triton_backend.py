"""The backend "triton": fused kernels for NVIDIA GPUs, called by jax-triton.

Each pass is one launch of a kernel of `triton_kernels`, a program for every
tile and head; backward is one for dq and one for dk and dv of each stream. No
two programs write the same place and none waits for another, so results do not
depend on the order in which they run: two runs agree bit for bit.

A short tile list (one chunk over a long cache) would leave multiprocessors
idle: then the keys of each tile are split over several programs, whose outputs
are merged by their log-sum-exp.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from crcm_jax.kernels import block_sizes
from crcm_jax.kernels.backend import Operands, Problem, Tangents
from crcm_jax.kernels.block_sizes import BlockSizes, Walk
from crcm_jax.kernels.mask import BlockMask

_DTYPES = ("bfloat16", "float16", "float32")
_WIDEST = 256
_MOST_SPLITS = 8
_CORES = 132  # multiprocessors of an H100: how many programs to aim for


class Launch(NamedTuple):
  """One run of a kernel."""

  kernel: str  # name in `triton_kernels`
  arrays: tuple[Array, ...]
  outputs: tuple[jax.ShapeDtypeStruct, ...]
  grid: tuple[int, ...]
  warps: int
  stages: int
  constants: dict[str, Any]


Launcher: TypeAlias = Callable[[Launch], Sequence[Array]]


def run_on_gpu(launch: Launch) -> Sequence[Array]:
  """Calls a kernel through jax-triton."""
  import jax_triton

  from crcm_jax.kernels import triton_kernels

  return jax_triton.triton_call(
    *launch.arrays,
    kernel=getattr(triton_kernels, launch.kernel),
    name="crcm_" + launch.kernel,
    out_shape=list(launch.outputs),
    grid=launch.grid,
    num_warps=launch.warps,
    num_stages=launch.stages,
    **launch.constants,
  )


@dataclasses.dataclass(frozen=True)
class Triton:
  """Fused Triton kernels for bfloat16, float16 and float32 on NVIDIA GPUs.

  Attributes:
    block_sizes: Tiles; None takes those measured on the device, or a guess.
    splits: Programs that share the keys of a tile in the forward pass; None
      splits where there are too few tiles to fill a GPU.
    launcher: Runs a kernel; others interpret it, or only compile it.
  """

  block_sizes: BlockSizes | None = None
  splits: int | None = None
  launcher: Launcher = run_on_gpu
  name: str = "triton"
  platforms: tuple[str, ...] = ("gpu",)

  def supports(self, problem: Problem, x: Operands) -> None:
    """Raises for what the kernels cannot do, with the reason."""
    _, s, n, d = x.q.shape
    if x.q.dtype.name not in _DTYPES:
      raise NotImplementedError(
        f"Triton attention computes in {', '.join(_DTYPES)}; got {x.q.dtype}. "
        f"Use implementation='xla'."
      )
    if d > _WIDEST:
      raise NotImplementedError(
        f"Triton attention holds heads of at most {_WIDEST}; got {d}. Use "
        f"implementation='xla'."
      )
    if problem.scale <= 0:
      raise NotImplementedError(
        f"Triton attention needs a positive `scale`; got {problem.scale}. "
        f"Negate the queries instead."
      )
    longest = max(s, *(k.shape[1] for k in x.keys))
    if longest * n * d >= 2**31:
      raise NotImplementedError(
        f"Triton attention counts the elements of a sequence in 32 bits; got "
        f"{longest} tokens of {n} heads of {d}. Use implementation='xla'."
      )
    if self.launcher is run_on_gpu:
      _check_installed()

  def tables(self, problem: Problem, x: Operands) -> tuple[Array, ...]:
    """Returns tiles of queries and their keys, then of keys and theirs."""
    sizes, mask = self._sizes(x), problem.mask
    lengths = [k.shape[1] for k in x.keys[problem.ranged :]]
    arrays = _table(mask, sizes.queries, lengths)
    for transposed in mask.transposed(lengths):
      arrays += _table(transposed, sizes.keys, [mask.num_queries])
    return tuple(map(jnp.asarray, arrays))

  def forward(self, problem: Problem, x: Operands) -> tuple[Array, Array]:
    """Computes `o` and `lse`."""
    splits = self.splits or _fill(len(x.tables[0]) * _heads(x), x)
    b, s, n, _ = x.q.shape
    dtype = x.q.dtype if splits == 1 else jnp.float32
    o, lse, _ = self._attend(
      problem,
      x,
      self._sizes(x).forward,
      [
        jax.ShapeDtypeStruct((splits, *x.q.shape), dtype),
        jax.ShapeDtypeStruct((splits, b, n, s), jnp.float32),
        _nothing(x),
      ],
      splits=splits,
    )
    return (o[0], lse[0]) if splits == 1 else _merged(o, lse, x.q.dtype)

  def fused(
    self, problem: Problem, x: Operands, t: Tangents
  ) -> tuple[Array, Array, Array]:
    """Computes output, `lse` and output tangent in one launch."""
    b, s, n, _ = x.q.shape
    lse = jax.ShapeDtypeStruct((b, n, s), jnp.float32)
    outputs = [_like(x.q), lse, _like(x.q)]
    o, lse, to = self._attend(problem, x, self._sizes(x).fused, outputs, t)
    return o, lse, to

  def linear(
    self, problem: Problem, x: Operands, o: Array, lse: Array, t: Tangents
  ) -> Array:
    """Computes the output tangent from a saved output and `lse`."""
    outputs = [_nothing(x), _nothing(x), _like(x.q)]
    walk = self._sizes(x).fused
    return self._attend(problem, x, walk, outputs, t, known=(o, lse))[2]

  def backward(
    self,
    problem: Problem,
    x: Operands,
    o: Array,
    lse: Array,
    do: Array,
    wanted: Sequence[bool],
  ) -> list[Array]:
    """Computes the wanted cotangents: dq, then dk and dv of each stream."""
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)
    rows = (do, lse, delta.swapaxes(1, 2))  # delta [b n s]
    grads = [self._query_gradient(problem, x, rows)] if wanted[0] else []
    for pair, want in enumerate(zip(wanted[1::2], wanted[2::2], strict=True)):
      if any(want):
        both = self._key_gradient(problem, x, rows, pair, *want)
        grads += [g for g, w in zip(both, want, strict=True) if w]
    return grads

  def _sizes(self, x: Operands) -> BlockSizes:
    return self.block_sizes or block_sizes.choose(x.q.dtype, x.q.shape[-1])

  def _attend(
    self,
    problem,
    x: Operands,
    walk: Walk,
    outputs,
    t=None,
    known=None,
    splits=1,
  ):
    """Launches `attend`: forward, fused with `t`, linear with `known` too."""
    t = t or Tangents(None, (None,) * problem.pairs, (None,) * problem.pairs)
    tiles, tables = _query_tables(problem, x)
    w_0, w_1 = _walks(x, walk, tables, t)
    return self.launcher(
      Launch(
        kernel="attend",
        arrays=(
          x.q,
          *_flat(x.keys, x.values, x.q),
          x.q if t.q is None else t.q,
          *_flat(t.keys, t.values, x.q),
          *(known or (x.q, x.q)),
          tiles,
          *_padded(tables, tiles),
        ),
        outputs=tuple(outputs),
        grid=(len(tiles) * _heads(x), splits),
        warps=walk.warps,
        stages=walk.stages,
        constants=dict(
          LENGTH=x.q.shape[1],
          TILES=len(tiles),
          SPLITS=splits,
          BLOCK_Q=_block(problem.mask, self._sizes(x).queries),
          HAS_TQ=t.q is not None,
          KNOWN=known is not None,
          w_0=w_0,
          w_1=w_1,
          z=_dims(problem, x),
        ),
      )
    )

  def _query_gradient(self, problem, x: Operands, rows) -> Array:
    """Launches `query_gradient`: dq."""
    sizes = self._sizes(x)
    tiles, tables = _query_tables(problem, x)
    w_0, w_1 = _walks(x, sizes.query_gradient, tables)
    (dq,) = self.launcher(
      Launch(
        kernel="query_gradient",
        arrays=(
          x.q,
          *_flat(x.keys, x.values, x.q),
          *rows,
          tiles,
          *_padded(tables, tiles),
        ),
        outputs=(_like(x.q),),
        grid=(len(tiles) * _heads(x),),
        warps=sizes.query_gradient.warps,
        stages=sizes.query_gradient.stages,
        constants=dict(
          LENGTH=x.q.shape[1],
          TILES=len(tiles),
          BLOCK_Q=_block(problem.mask, sizes.queries),
          w_0=w_0,
          w_1=w_1,
          z=_dims(problem, x),
        ),
      )
    )
    return dq

  def _key_gradient(
    self, problem, x: Operands, rows, pair: int, want_k: bool, want_v: bool
  ):
    """Launches `key_gradient`: dk and dv of one stream, those wanted."""
    sizes, walk = self._sizes(x), self._sizes(x).key_gradient
    keys, values = x.keys[pair], x.values[pair]
    ranged = problem.ranged and pair == 0
    tiles, table, longest = self._key_tables(problem, x, pair)
    return self.launcher(
      Launch(
        kernel="key_gradient",
        arrays=(
          x.q,
          keys,
          values,
          *rows,
          tiles,
          table,
          x.ranges if ranged else tiles,
        ),
        outputs=(
          _like(keys) if want_k else _nothing(x),
          _like(keys) if want_v else _nothing(x),
        ),
        grid=(len(tiles) * _heads(x),),
        warps=walk.warps,
        stages=walk.stages,
        constants=dict(
          LENGTH=keys.shape[1],
          TILES=len(tiles),
          BLOCK_K=_power(min(longest, sizes.keys)),
          VISIBLE=len(x.ranges) if ranged else 0,
          WANT_K=want_k,
          WANT_V=want_v,
          w=_walk(x.q.shape[1], walk, table),
          z=_dims(problem, x),
        ),
      )
    )

  def _key_tables(self, problem: Problem, x: Operands, pair: int):
    """Tiles of one stream's keys, the queries of each, and the longest tile."""
    masked = problem.pairs - problem.ranged
    block = self._sizes(x).keys
    if problem.ranged and pair == 0:  # all keys, as far as ranges show them
      s, y = x.q.shape[1], x.keys[0].shape[1]
      mask = BlockMask.full(y, s)
      tiles, table = map(jnp.asarray, _table(mask, block, [s]))
    else:
      at = pair - problem.ranged
      lengths = [k.shape[1] for k in x.keys[problem.ranged :]]
      mask = problem.mask.transposed(lengths)[at]
      tiles, table = x.tables[1 + masked + 2 * at :][:2]
    return tiles, table, mask.tile_size(block)


def _table(mask: BlockMask, block: int, lengths) -> list[np.ndarray]:
  """Tiles and the ranges of each, those with the most work first."""
  tiles, ranges = mask.tile_table(block, lengths)
  work = sum((np.diff(r)[..., 0].sum(1) for r in ranges), np.zeros(len(tiles)))
  order = np.argsort(-work, kind="stable")
  return [tiles[order], *(r[order] for r in ranges)]


def _query_tables(problem: Problem, x: Operands):
  """Tiles of queries, and what each sees of every stream."""
  tiles, *tables = x.tables[: 1 + problem.pairs - problem.ranged]
  if x.ranges is not None:
    tables.insert(0, jnp.broadcast_to(x.ranges, (len(tiles), *x.ranges.shape)))
  return tiles, tables


def _walks(x: Operands, walk: Walk, tables, t: Tangents | None = None):
  """How the kernel walks over the two streams; one may not be there."""
  from crcm_jax.kernels import triton_kernels

  none = (None,) * len(x.keys)
  t_keys, t_values = (t.keys, t.values) if t else (none, none)
  walks = [
    _walk(k.shape[1], walk, table, tk is not None, tv is not None)
    for k, table, tk, tv in zip(x.keys, tables, t_keys, t_values, strict=True)
  ]
  return _padded(walks, triton_kernels.Walk(0, 0, 16, False, False))


def _walk(length: int, walk: Walk, table, has_tk=False, has_tv=False):
  from crcm_jax.kernels import triton_kernels

  active = (has_tk or has_tv) and walk.active_block
  block = min(walk.active_block if active else walk.block, _power(length))
  return triton_kernels.Walk(length, table.shape[1], block, has_tk, has_tv)


def _dims(problem: Problem, x: Operands):
  from crcm_jax.kernels import triton_kernels

  _, _, n, d = x.q.shape
  base_2 = problem.scale * math.log2(math.e)
  return triton_kernels.Dims(n, d, _power(d), problem.scale, base_2)


def _fill(programs: int, x: Operands) -> int:
  """Splits that leave the fewest multiprocessors idle in the last wave."""
  longest = max(k.shape[1] for k in x.keys)
  if programs >= 4 * _CORES or longest < 2048:
    return 1
  waves = lambda n: math.ceil(programs * n / _CORES) / n + 0.02 * n
  return min(range(1, _MOST_SPLITS + 1), key=waves)


def _merged(o, lse, dtype):
  """Joins the outputs of splits [splits ...] by their log-sum-exp."""
  # Sums of a few terms, not reductions: XLA makes two kernels of it, not four.
  lse = list(lse.swapaxes(2, 3)[..., None])  # [b s n 1] each
  m = functools.reduce(jnp.maximum, lse)
  weights = [jnp.exp(x - jnp.where(m == -jnp.inf, 0, m)) for x in lse]
  total = sum(weights)
  joined = sum(x * weight for x, weight in zip(o, weights, strict=True))
  joined = joined / jnp.where(total == 0, 1, total)
  return joined.astype(dtype), (m + jnp.log(total))[..., 0].swapaxes(1, 2)


def _heads(x: Operands) -> int:
  """Batch elements times heads."""
  return x.q.shape[0] * x.q.shape[2]


def _block(mask: BlockMask, block: int) -> int:
  return _power(mask.tile_size(block))


def _power(size: int) -> int:
  """The power of 2, at least 16, that holds `size`."""
  return max(16, 1 << (size - 1).bit_length())


def _flat(keys, values, absent):
  """Keys and values of two streams; the kernel does not read `absent`."""
  flat = itertools.chain(*zip(keys, values, strict=True))
  present = [absent if a is None else a for a in flat]
  return [*present, *[absent] * (4 - len(present))]


def _padded(items, absent) -> list:
  return [*items, *[absent] * (2 - len(items))]


def _like(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _nothing(x: Operands) -> jax.ShapeDtypeStruct:
  """The place of an output that this launch does not write."""
  return jax.ShapeDtypeStruct((1,), x.q.dtype)


def _check_installed():
  """Raises if jax-triton cannot be used, saying how to get it."""
  try:
    import jax_triton  # noqa: F401
    import triton  # noqa: F401
  except Exception as error:
    raise NotImplementedError(
      f"Triton attention needs triton and jax-triton that fit this JAX "
      f"({jax.__version__}): {error}. Install them with "
      f"`pip install 'crcm_jax[gpu]'`."
    ) from error
