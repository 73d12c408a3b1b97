"""Speed and memory of attention on one GPU, beside what the device can do.

    python benchmarks/attention.py                  # the table
    python benchmarks/attention.py --tune           # measures tiles first
    python benchmarks/attention.py --memory         # growth with length

The work is that of Wan2.1-1.3B at 480p: 12 heads of 128, 21 latent frames of
1,560 tokens, bfloat16, batch 1. A product is a matrix product that the result
needs, 2 * 128 * 12 floating-point operations for each visible (query, key)
pair; its count is the least that any implementation can do. The limit is the
time of those products at the rate of the device's best dense attention (cuDNN
forward, measured in the same run). `--tune` writes the fastest tiles to
`kernels/block_sizes/DEVICE.json`, which the backend "triton" reads.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp

from crcm_jax import kernels
from crcm_jax.chunks import ChunkPattern
from crcm_jax.kernels import block_sizes
from crcm_jax.kernels.block_sizes import BlockSizes, Walk

FRAMES, TOKENS, HEADS = 21, 1560, 12
ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Work:
  """A call to time.

  Attributes:
    name: What it computes.
    run: The jitted function.
    args: Its arguments.
    products: Needed (query, key) products of one head.
    original: Milliseconds of the original implementation, if measured.
    must: Milliseconds asked for.
  """

  name: str
  run: object
  args: tuple
  products: float
  original: float | None = None
  must: float | None = None


def seconds(run, args, budget=0.4) -> float:
  """Median time of a call, from rounds of calls in flight together."""
  wait = lambda: jax.block_until_ready(run(*args))
  wait()
  start = time.perf_counter()
  wait()
  once = time.perf_counter() - start
  calls = max(1, min(50, int(budget / 5 / once)))
  rounds = []
  for _ in range(5):
    start = time.perf_counter()
    for _ in range(calls):
      out = run(*args)
    jax.block_until_ready(out)
    rounds.append((time.perf_counter() - start) / calls)
  return statistics.median(rounds)


def draw(seed, tokens, width, dtype, heads=HEADS):
  """A random stream [1 tokens heads width]."""
  shape = (1, tokens, heads, width)
  return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(
    dtype
  )


def streams(first, rest):
  """Masks of the clean and the noisy stream."""
  boundaries = ChunkPattern(first, rest).token_boundaries(FRAMES, TOKENS)
  return (
    kernels.BlockMask.block_causal(boundaries),
    kernels.BlockMask.noisy_rows(boundaries),
  )


def teacher_forcing(clean, noisy, backend):
  """Forward of both streams, as a function of their six arrays."""
  attend = functools.partial(kernels.attention, implementation=backend)

  def both(q_c, k_c, v_c, q_n, k_n, v_n):
    return (
      attend(q_c, k_c, v_c, mask=clean),
      attend(q_n, k_n, v_n, context=(k_c, v_c), mask=noisy),
    )

  return both


def tangent(both):
  """Output and tangent of the noisy stream, output of the clean one."""

  def run(clean, noisy, tangents):
    moving = lambda *noisy: both(*clean, *noisy)
    return jax.jvp(moving, noisy, tangents)

  return run


def cotangents(both, args):
  """The pullback of both streams as a jitted function, and its arguments."""
  (o, pullback) = jax.jit(lambda *x: jax.vjp(both, *x))(*args)
  return jax.jit(lambda pullback, do: pullback(do)), (pullback, o)


def works(backend, width=128, dtype=jnp.bfloat16):
  """The rows of the table."""
  tokens = FRAMES * TOKENS
  six = tuple(draw(i, tokens, width, dtype) for i in range(6))
  moved = tuple(draw(i, tokens, width, dtype) for i in range(6, 9))
  for (first, rest), anchors in (
    ((1, 1), ((99.4, 25), (17.3, 16), (49.4, 48))),
    ((3, 3), ((114.8, 29), (18.9, None), (50.7, None))),
  ):
    clean, noisy = streams(first, rest)
    both = teacher_forcing(clean, noisy, backend)
    (past,) = clean.visible_pairs([tokens])
    history, own = noisy.visible_pairs([tokens, tokens])
    name = f"({first}, {rest})"
    forward = 2 * (past + history + own)
    yield Work(
      f"clean + noisy, output and tangent, {name}",
      jax.jit(tangent(both)),
      (six[:3], six[3:], moved),
      2 * past + 4 * history + 6 * own,
      *anchors[0],
    )
    yield Work(
      f"clean + noisy forward, {name}", jax.jit(both), six, forward, *anchors[1]
    )
    yield Work(
      f"backward of the same, {name}",
      *cotangents(both, six),
      5 * forward / 2,
      *anchors[2],
    )
  attend = functools.partial(kernels.attention, implementation=backend)
  cached = lambda q, k, v, k_c, v_c, ranges: attend(
    q, k, v, context=(k_c, v_c), context_ranges=ranges
  )
  for frames, must in ((1, 1.0), (3, None)):
    chunk = [x[:, : frames * TOKENS] for x in six[3:]]
    ranges = jnp.array([[0, 18 * TOKENS]], jnp.int32)
    yield Work(
      f"{frames} frame(s) over an 18-frame cache",
      jax.jit(cached),
      (*chunk, *six[1:3], ranges),
      2 * frames * TOKENS * (18 + frames) * TOKENS,
      None,
      must,
    )
  dense = jax.jit(lambda q, k, v: attend(q, k, v))
  yield Work("dense forward", dense, six[:3], 2 * tokens**2, 10.7, 15)


def limits(width=128, dtype=jnp.bfloat16) -> dict[str, float]:
  """TFLOP/s of a large matrix product and of cuDNN's dense attention."""
  a = draw(0, 8192, 8192, dtype, heads=1)[0, :, 0]
  rates = {}
  product = jax.jit(lambda a, b: a @ b)
  rates["8192-cubed matrix product"] = 2 * 8192**3 / seconds(product, (a, a.T))
  tokens = FRAMES * TOKENS
  q, k, v = (draw(i, tokens, width, dtype) for i in range(3))
  cudnn = jax.jit(
    functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
  )
  rates["cuDNN dense attention forward"] = (
    4 * width * HEADS * tokens**2 / seconds(cudnn, (q, k, v))
  )
  return {name: rate / 1e12 for name, rate in rates.items()}


def table(backend, width, dtype) -> list[dict]:
  """Times every row and prints it."""
  rates = limits(width, dtype)
  for name, rate in rates.items():
    print(f"{name}: {rate:.0f} TFLOP/s")
  best = rates["cuDNN dense attention forward"]
  print(
    f"{'':45} {'ms':>7} {'TFLOP/s':>8} {'limit':>6} {'must':>5} {'orig.':>6}"
  )
  rows = []
  for work in works(backend, width, dtype):
    took = seconds(work.run, work.args)
    flops = work.products * 2 * width * HEADS
    row = dict(
      work=work.name,
      ms=1e3 * took,
      tflops=flops / took / 1e12,
      limit_ms=flops / best / 1e9,
      must_ms=work.must,
      original_ms=work.original,
    )
    rows.append(row)
    print(
      f"{work.name:45} {row['ms']:7.2f} {row['tflops']:8.0f} "
      f"{row['limit_ms']:6.2f} {work.must or '':>5} {work.original or '':>6}",
      flush=True,
    )
  return rows


# --- Memory ---


def memory(backend, width, dtype):
  """Prints temporary bytes of the compiled programs at three lengths."""
  for frames in (5, 10, 20):
    boundaries = ChunkPattern(1, 1).token_boundaries(frames, TOKENS)
    masks = (
      kernels.BlockMask.block_causal(boundaries),
      kernels.BlockMask.noisy_rows(boundaries),
    )
    both = teacher_forcing(*masks, backend)
    shape = (1, frames * TOKENS, HEADS, width)
    three = (jax.ShapeDtypeStruct(shape, dtype),) * 3
    gradient = lambda *x, both=both: jax.vjp(both, *x)[1](both(*x))
    sizes = [
      jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes
      for run, args in (
        (tangent(both), (three, three, three)),
        (gradient, (*three, *three)),
      )
    ]
    print(
      f"{frames * TOKENS:6} tokens a stream: tangent {sizes[0] / 2**20:7.1f} "
      f"MiB, gradient {sizes[1] / 2**20:7.1f} MiB of temporary memory",
      flush=True,
    )


# --- Tuning ---


_WALKS_OVER_KEYS = ("forward", "fused", "query_gradient")


def candidates():
  """Tiles to try: (kernel, tokens of the tile, walk)."""
  sizes = lambda kind, tiles, blocks, stages, active=(None,): [
    (
      kind,
      tile,
      Walk(block=b, active_block=a, warps=max(4, tile // 16), stages=s),
    )
    for tile, b, a, s in itertools.product(tiles, blocks, active, stages)
  ]
  return [
    *sizes("forward", (128, 64), (64, 128), (2, 3)),
    *sizes("fused", (128, 64), (32, 64), (2, 3), (32,)),
    *sizes("query_gradient", (128, 64), (32, 64, 128), (2, 3)),
    *sizes("key_gradient", (128, 64), (32, 64, 128), (2, 3)),
  ]


def tune(width, dtype):
  """Times every candidate of every kernel on the frame-wise masks."""
  tokens = FRAMES * TOKENS
  clean, noisy = streams(1, 1)
  six = tuple(draw(i, tokens, width, dtype) for i in range(6))
  moved = tuple(draw(i, tokens, width, dtype) for i in range(6, 9))

  def work(kind, sizes):
    backend = kernels.Triton(block_sizes=sizes)
    attend = lambda q, k, v, *context: kernels.attention(
      q, k, v, context=context, mask=noisy, implementation=backend
    )
    if kind == "forward":
      mine = lambda q, k, v: kernels.attention(
        q, k, v, mask=clean, implementation=backend
      )
      return jax.jit(mine), six[:3]
    if kind == "fused":
      run = lambda noisy, context, t: jax.jvp(
        lambda *noisy: attend(*noisy, *context), noisy, t
      )
      return jax.jit(run), (six[3:], six[1:3], moved)
    if kind == "query_gradient":
      return cotangents(lambda q: attend(q, *six[4:], *six[1:3]), six[3:4])
    mine = lambda *kv: attend(six[3], *kv)
    return cotangents(mine, (*six[4:], *six[1:3]))

  guess = block_sizes.guess(dtype, width)
  for kind, tile, walk in candidates():
    side = "queries" if kind in _WALKS_OVER_KEYS else "keys"
    sizes = dataclasses.replace(guess, **{side: tile, kind: walk})
    try:
      took = 1e3 * seconds(*work(kind, sizes), budget=0.1)
    except Exception as error:  # too much shared memory, for instance
      print(f"{kind:14} {tile:3} {walk}: {str(error)[:80]!r}", flush=True)
      continue
    print(f"{kind:14} {tile:3} {took:7.2f} ms {walk}", flush=True)
    yield kind, tile, walk, took


def fastest(measured, guess: BlockSizes) -> BlockSizes:
  """The best walk of each kernel; kernels over keys share a tile of queries."""
  best = {}
  for kind, tile, walk, took in measured:
    old = best.get((kind, tile))
    if old is None or took < old[0]:
      best[kind, tile] = (took, walk)
  never = (float("inf"), None)
  took = lambda tile: sum(
    best.get((k, tile), never)[0] for k in _WALKS_OVER_KEYS
  )
  queries = min((64, 128), key=took)
  keys = min((64, 128), key=lambda t: best.get(("key_gradient", t), never)[0])
  walks = {kind: best[kind, queries][1] for kind in _WALKS_OVER_KEYS}
  walks["key_gradient"] = best["key_gradient", keys][1]
  return dataclasses.replace(guess, queries=queries, keys=keys, **walks)


def write_sizes(sizes: BlockSizes, width, dtype) -> pathlib.Path:
  """Adds measured sizes to the table of this kind of device."""
  kind = jax.devices()[0].device_kind
  path = ROOT / "kernels" / "block_sizes" / block_sizes.table_name(kind)
  path.parent.mkdir(exist_ok=True)
  found = json.loads(path.read_text()) if path.exists() else {"sizes": {}}
  found |= dict(
    device=kind,
    date=datetime.date.today().isoformat(),
    command="python benchmarks/attention.py --tune",
    jax=jax.__version__,
  )
  found["sizes"][f"{jnp.dtype(dtype).name}/{width}"] = dataclasses.asdict(sizes)
  path.write_text(json.dumps(found, indent=1) + "\n")
  return path


def main():
  """Reads the command line and prints what it asks for."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--tune", action="store_true")
  parser.add_argument("--memory", action="store_true")
  parser.add_argument("--implementation", default="triton")
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--json", type=pathlib.Path, help="writes the rows here")
  options = parser.parse_args()
  width, dtype = options.width, jnp.dtype(options.dtype)
  print(jax.devices()[0].device_kind, "JAX", jax.__version__)
  if options.tune:
    guess = block_sizes.guess(dtype, width)
    sizes = fastest(tune(width, dtype), guess)
    print("written:", write_sizes(sizes, width, dtype))
  if options.memory:
    memory(options.implementation, width, dtype)
    return
  backend = options.implementation
  if options.tune:  # the table on disk may have been read before it was written
    backend = kernels.Triton(block_sizes=sizes)
  rows = table(backend, width, dtype)
  if options.json:
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  main()
