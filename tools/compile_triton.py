"""Compiles the Triton kernels for GPUs that are not there, and reports on them.

    python tools/compile_triton.py [80 90 100] [--json]

The calls are those of Wan2.1-1.3B at 480p with the tiles that each generation
would get. A row says what one launch takes: registers a thread, bytes spilled
to memory, shared memory, and its matrix products (a walk holds its products
twice: for whole blocks, and for the last one of a range).
"""

import argparse
import dataclasses
import inspect
import json
import os
import pathlib
import re
import subprocess
import tempfile

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from crcm_jax import kernels
from crcm_jax.chunks import ChunkPattern
from crcm_jax.kernels import block_sizes
from crcm_jax.kernels.backend import Problem, Tangents

TOKENS, FRAMES, HEADS = 1560, 21, 12
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_NAMES["int32"] = "i32"


@dataclasses.dataclass(eq=False)
class Compiler:
  """A launcher of `kernels.Triton` that compiles instead of running.

  Attributes:
    capability: Ten times the compute capability.
    rows: One a launch: kernel and what it takes.
  """

  capability: int
  rows: list = dataclasses.field(default_factory=list)

  def __call__(self, launch):
    """Compiles one launch; its outputs are zeros."""
    from crcm_jax.kernels import triton_kernels

    kernel = getattr(triton_kernels, launch.kernel)
    arrays = [*launch.arrays, *launch.outputs]
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {
      name: "*" + _NAMES[jnp.dtype(a.dtype).name]
      for name, a in zip(names, arrays, strict=False)
    }
    source = ASTSource(
      kernel,
      signature | dict.fromkeys(launch.constants, "constexpr"),
      launch.constants,
      {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},
    )
    compiled = triton.compile(
      source,
      target=GPUTarget("cuda", self.capability, 32),
      options=dict(num_warps=launch.warps, num_stages=launch.stages),
    )
    registers, stack = _usage(compiled.asm["cubin"])
    self.rows.append(
      dict(
        kernel=launch.kernel,
        programs=launch.grid,
        warps=launch.warps,
        stages=launch.stages,
        registers=registers,
        spilled=stack,
        shared=compiled.metadata.shared,
        products=len(re.findall(r"tt\.dot ", compiled.asm["ttir"])),
      )
    )
    return [jnp.zeros(o.shape, o.dtype) for o in launch.outputs]


def _usage(cubin: bytes) -> tuple[int, int]:
  """Registers a thread, and bytes of stack, of a compiled kernel."""
  tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
  with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(cubin)
    file.flush()
    out = subprocess.run(
      [tools / "cuobjdump", "-res-usage", file.name],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
  ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", out)
  return int(registers), int(stack)


def calls():
  """The passes to compile: name, dtype, head width, problem, function."""
  boundaries = ChunkPattern(1, 1).token_boundaries(FRAMES, TOKENS)
  clean = kernels.BlockMask.block_causal(boundaries)
  noisy = kernels.BlockMask.noisy_rows(boundaries)
  own = kernels.BlockMask.full(TOKENS, TOKENS)

  def forward(problem, x):
    return problem.backend.forward(problem, x)

  def fused(problem, x):
    t = Tangents(x.q, (None, x.keys[1]), (None, x.values[1]))
    return problem.backend.fused(problem, x, t)

  def linear(problem, x):
    t = Tangents(x.q, x.keys, x.values)
    return problem.backend.linear(problem, x, x.q, _lse(x), t)

  def backward(problem, x):
    wanted = (True,) * (1 + 2 * len(x.keys))
    return problem.backend.backward(problem, x, x.q, _lse(x), x.q, wanted)

  bf16 = ("bfloat16", 128)
  return [
    ("clean forward", *bf16, (clean, 1, False), forward),
    ("noisy forward", *bf16, (noisy, 2, False), forward),
    ("noisy output and tangent", *bf16, (noisy, 2, False), fused),
    ("noisy tangent", *bf16, (noisy, 2, False), linear),
    ("noisy backward", *bf16, (noisy, 2, False), backward),
    ("a frame over a cache", *bf16, (own, 2, True), forward),
    ("heads of 64, fp16", "float16", 64, (noisy, 2, False), fused),
    ("heads of 256", "bfloat16", 256, (noisy, 2, False), backward),
    ("float32", "float32", 128, (noisy, 2, False), fused),
  ]


def _lse(x):
  b, s, n, _ = x.q.shape
  return jnp.zeros((b, n, s), jnp.float32)


def compile_call(capability, dtype, width, about, run) -> list[dict]:
  """Compiles the launches of one pass."""
  mask, pairs, ranged = about
  compiler = Compiler(capability)
  sizes = block_sizes.guess(dtype, width, capability / 10)
  backend = kernels.Triton(block_sizes=sizes, launcher=compiler)
  problem = Problem(backend, mask, width**-0.5, pairs, ranged, fused=True)

  def trace(*flat):
    flat = list(flat)
    if ranged:
      flat.append(jnp.zeros((1, 2), jnp.int32))
    flat += backend.tables(problem, problem.operands(flat))
    return run(problem, problem.operands(flat))

  array = lambda s: jax.ShapeDtypeStruct((1, s, HEADS, width), jnp.dtype(dtype))
  s = mask.num_queries
  context = (18 * TOKENS if ranged else s,) * 2 * (pairs - 1)
  jax.eval_shape(trace, *map(array, (s, *context, s, s)))
  return compiler.rows


def main():
  """Compiles everything for every generation asked for; fails if one cannot."""
  parser = argparse.ArgumentParser(
    description="Compiles the Triton kernels without a GPU."
  )
  parser.add_argument("capabilities", nargs="*", type=int)
  parser.add_argument("--json", action="store_true", help="prints JSON lines")
  options = parser.parse_args()
  for capability in options.capabilities or SHARED_MEMORY:
    for name, *call in calls():
      for row in compile_call(capability, *call):
        row = dict(capability=capability, call=name, **row)
        if options.json:
          print(json.dumps(row), flush=True)
        else:
          print(" ".join(f"{k}={v}" for k, v in row.items()), flush=True)
        if row["shared"] > SHARED_MEMORY[capability]:
          raise SystemExit(f"too much shared memory: {row}")


if __name__ == "__main__":
  main()
