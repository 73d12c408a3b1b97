"""Compiles the TPU attention kernels at Wan2.1-1.3B's sizes, without a TPU.

libtpu's compiler reports what can be known before running: that the kernels fit
the chip, the time to compile them, the VMEM they take, the products they do
against those that the mask needs, and the length of the schedule of a tile
against the cycles that its matrix units need at least.

    python benchmarks/attention_tpu.py --topologies v5e:2x2,v6e:2x2
"""

import argparse
import functools
import itertools
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

HEADS, WIDTH, FRAMES, TOKENS = 12, 128, 21, 1560
LENGTH = FRAMES * TOKENS
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


class Program(NamedTuple):
  """One use of attention, and what it takes.

  `products` holds (products, visible pairs of a query and a key).
  """

  run: Callable[..., Any]
  shapes: list[tuple[int, ...]]
  kernels: frozenset[str]
  products: tuple[tuple[int, int], ...]


def programs(implementation) -> dict[str, Program]:
  """The programs by name, for an `implementation` of attention."""
  import jax

  from crcm_jax import kernels

  bounds = tuple(range(0, LENGTH + 1, TOKENS))
  noisy = kernels.BlockMask.noisy_rows(bounds)
  clean = kernels.BlockMask.block_causal(bounds)
  attention = functools.partial(
    kernels.attention, implementation=implementation
  )

  def attend(q, k, v, *context):
    return attention(q, k, v, context=context, mask=noisy)

  def fused(q, k, v, context_k, context_v, *tangents):
    run = lambda *x: attend(*x, context_k, context_v)
    return jax.jvp(run, (q, k, v), tangents)

  def decode(q, k, v, context_k, context_v, ranges):
    context = (context_k, context_v)
    return attention(q, k, v, context=context, context_ranges=ranges)

  own = FRAMES * TOKENS**2
  past = sum(range(FRAMES)) * TOKENS**2
  one, cache = _shape(TOKENS), _shape(18 * TOKENS)
  x = _shape(LENGTH)
  return {
    "forward, clean": Program(
      lambda q, k, v: attention(q, k, v, mask=clean),
      [x] * 3,
      frozenset({"forward"}),
      ((2, past + own),),
    ),
    "forward, noisy": Program(
      attend, [x] * 5, frozenset({"forward"}), ((2, past + own),)
    ),
    "fused, noisy": Program(
      fused, [x] * 8, frozenset({"fused"}), ((4, past), (6, own))
    ),
    "backward, noisy": Program(
      lambda do, *x: jax.vjp(attend, *x)[1](do),
      [x] * 6,
      frozenset({"forward", "dq", "dkv"}),
      ((2 + 3 + 4, past + own),),
    ),
    "decode": Program(
      decode,
      [one] * 3 + [cache] * 2 + [(1, 2)],
      frozenset({"forward"}),
      ((2, 19 * TOKENS**2),),
    ),
  }


def flops(program: Program) -> int:
  """Floating-point operations that a program cannot do without."""
  return sum(2 * WIDTH * HEADS * n * pairs for n, pairs in program.products)


def _shape(tokens: int) -> tuple[int, ...]:
  return 1, tokens, HEADS, WIDTH


def compile_for(topology: str, program: Program):
  """Compiles a program for one chip of a topology."""
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies

  chips = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices
  mesh = jax.sharding.Mesh(np.array(chips[:1]), ("x",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  args = [
    jax.ShapeDtypeStruct(
      s, jnp.bfloat16 if len(s) == 4 else jnp.int32, sharding=sharding
    )
    for s in program.shapes
  ]
  with jax.set_mesh(mesh):
    return jax.jit(program.run).lower(*args).compile()


# --- What the compiler's dumps say ---


def vmem_bytes(dump: pathlib.Path, kernel: str) -> int:
  """All VMEM of a kernel: windows, sums, and spilled registers."""
  text = _read(dump, kernel, "post-delay-converter")
  sizes = re.findall(r"space=vmem, size = (0x[0-9a-f]+)", text)
  return sum(int(size, 16) for size in sizes)


def tile_cycles(dump: pathlib.Path, kernel: str) -> list[int]:
  """Instruction bundles of each region of a kernel that multiplies matrices.

  For each pair of keys and values these are two: a whole tile, and a sub-tile
  of 256 keys at a boundary.
  """
  bundles = _read(dump, kernel, "final_bundles")
  used = _read(dump, kernel, "final_hlo-static-per-bundle-utilization")
  multiplies = [int(row.split()[0]) for row in used.splitlines()[4:]]
  labels = re.findall(r"^ *0x([0-9a-f]+) +(?:LB|PF|LE|LH|PB):", bundles, re.M)
  cuts = [0, *(int(label, 16) for label in labels), len(multiplies)]
  return [
    stop - start
    for start, stop in itertools.pairwise(cuts)
    if sum(multiplies[start:stop])
  ]


def least_cycles(
  topology: str, products: int, queries: int, keys: int
) -> float:
  """Cycles that the matrix units need for a tile, heads being 128 wide.

  v5e and v5p have four 128 x 128 units a core; v6e and 7x have two of 256 x
  256 at two rows a cycle, which such heads fill by half.
  """
  four = topology.startswith("v5")
  rate = 4 * 128 * 128 if four else 2 * 2 * 256 * 128
  return products * queries * keys * WIDTH / rate


def _read(dump: pathlib.Path, kernel: str, stage: str) -> str:
  (path, *_) = sorted(dump.glob(f"*-attention_{kernel}.*-{stage}.txt"))
  return path.read_text()


# Products over a whole tile, of each pair of keys and values.
PRODUCTS = {"forward": (2, 2), "fused": (4, 6), "dq": (3, 3), "dkv": (4,)}
QUERIES = {"forward": 1568, "fused": 1568, "dq": 1568, "dkv": 1664}
KEYS = 512


def report(topology: str, name: str, program: Program, dump: pathlib.Path):
  """Compiles a program and prints a row for each of its kernels."""
  start = time.perf_counter()
  compile_for(topology, program)
  seconds = time.perf_counter() - start
  for kernel in sorted(program.kernels):
    whole = tile_cycles(dump, kernel)[::2]
    tiles = ", ".join(
      f"{n} products: {cycles} ({min(least / cycles, 1):.0%})"
      for n, cycles in zip(PRODUCTS[kernel], whole, strict=False)
      for least in [least_cycles(topology, n, QUERIES[kernel], KEYS)]
    )
    cells = (
      topology,
      name,
      f"{seconds:.0f}",
      f"{flops(program) / 1e12:.2f}",
      kernel,
      f"{vmem_bytes(dump, kernel) / 2**20:.1f}",
      tiles,
    )
    print("|", " | ".join(cells), "|", flush=True)


def main():
  """Prints a table in Markdown."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
  args = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  root = pathlib.Path(tempfile.mkdtemp())
  os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={root} --xla_jf_dump_llo_text=true"
  )
  print(
    "| topology | program | compile s | TFLOP needed | kernel | VMEM MiB "
    "| cycles of a whole tile, for clean and own keys (share that the matrix "
    "units need) |"
  )
  print("|---|---|---|---|---|---|---|")
  for topology in args.topologies.split(","):
    for name, program in programs("pallas_tpu").items():
      report(topology, name, program, root)
      for path in root.iterdir():
        path.unlink()


if __name__ == "__main__":
  main()
