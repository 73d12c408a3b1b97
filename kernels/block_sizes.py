"""Sizes of the tiles in which the Triton kernels cut attention.

They come from, in this order: the caller, the table measured on this kind of
device (`block_sizes/*.json`, written by `benchmarks/attention.py --tune`), or a
guess from dtype, head width and the device's generation.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

TABLES = pathlib.Path(__file__).parent / "block_sizes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
  """How one kernel walks: tokens a block, warps, loads in flight.

  Attributes:
    block: Tokens of a block on the walk, a power of 2 of at least 16.
    active_block: The same over keys that have tangents.
    warps: Warps a program: 4 or 8.
    stages: Blocks in flight, at least 1.
  """

  block: int
  active_block: int | None = None
  warps: int = 8
  stages: int = 3

  def __post_init__(self):
    _check_block("block", self.block)
    if self.active_block is not None:
      _check_block("active_block", self.active_block)
    if self.warps not in (1, 2, 4, 8, 16):
      raise ValueError(f"`warps` must be a power of 2, 1-16; got {self.warps}.")
    if self.stages < 1:
      raise ValueError(f"`stages` must be at least 1; got {self.stages}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizes:
  """Tiles of the Triton kernels.

  Attributes:
    queries: Most queries in a tile.
    keys: Most keys in a tile of `key_gradient`.
    forward: Walk over keys for o.
    fused: Walk over keys for o and its tangent, or the tangent alone.
    query_gradient: Walk over keys for dq.
    key_gradient: Walk over queries for dk and dv.
  """

  queries: int
  keys: int
  forward: Walk
  fused: Walk
  query_gradient: Walk
  key_gradient: Walk

  def __post_init__(self):
    _check_block("queries", self.queries)
    _check_block("keys", self.keys)

  @classmethod
  def from_dict(cls, sizes: Mapping) -> "BlockSizes":
    """Builds sizes from the nested dict that `dataclasses.asdict` gives."""
    return cls(
      **{
        name: Walk(**value) if isinstance(value, Mapping) else value
        for name, value in sizes.items()
      }
    )


def _check_block(name: str, size: int):
  if size < 16 or size & (size - 1):
    raise ValueError(
      f"`{name}` must be a power of 2 of at least 16 tokens; got {size}."
    )


def choose(dtype, width: int) -> BlockSizes:
  """Returns measured sizes for the device at hand, or a guess.

  Args:
    dtype: Of the queries.
    width: Of a head.
  """
  dtype = jnp.dtype(dtype)
  kind, capability = _device()
  measured = _table(kind).get(f"{dtype.name}/{_padded(width)}")
  return measured or guess(dtype, width, capability)


def guess(dtype, width: int, capability: float = 9.0) -> BlockSizes:
  """Returns sizes that fit registers and shared memory, not measured ones."""
  width = _padded(width)
  exact = jnp.dtype(dtype) == jnp.float32
  if capability >= 9 and width <= 128 and not exact:
    return BlockSizes(
      queries=128,
      keys=128,
      forward=Walk(block=128, stages=3 if capability < 10 else 2),
      fused=Walk(block=64, active_block=32),
      query_gradient=Walk(block=64),
      key_gradient=Walk(block=64),
    )
  # Registers hold two accumulators [queries, width], shared memory the blocks.
  if exact:
    queries = 16 if width > 128 else 64 if capability >= 9 else 32
    warps = 8 if queries == 64 else 4
    walk = Walk(block=16, active_block=16, warps=warps, stages=1)
  else:
    queries = 128 if width <= 128 else 64
    walk = Walk(block=32, active_block=16, stages=2 if width <= 128 else 1)
  return BlockSizes(
    queries=queries,
    keys=32 if exact else 64,
    forward=walk,
    fused=walk,
    query_gradient=walk,
    key_gradient=walk,
  )


def table_name(device_kind: str) -> str:
  """Returns the file name of a device kind's table.

  Example:
    >>> table_name("NVIDIA H100 80GB HBM3")
    'NVIDIA_H100.json'
  """
  model = re.match(r"NVIDIA [A-Z]+\d+", device_kind)
  name = model[0] if model else device_kind
  return re.sub(r"\W+", "_", name) + ".json"


@functools.cache
def _table(device_kind: str) -> dict[str, BlockSizes]:
  path = TABLES / table_name(device_kind)
  if not path.exists():
    return {}
  rows = json.loads(path.read_text())["sizes"]
  return {key: BlockSizes.from_dict(row) for key, row in rows.items()}


@functools.cache
def _device() -> tuple[str, float]:
  """Kind and compute capability of the first GPU; a Hopper where there is none.

  Without a GPU the kernels can only be compiled or interpreted.
  """
  device = jax.devices()[0]
  if device.platform != "gpu":
    return "none", 9.0
  return device.device_kind, float(getattr(device, "compute_capability", 8.0))


def _padded(width: int) -> int:
  """The power of 2, at least 16, that holds a head."""
  return max(16, 1 << (width - 1).bit_length())
