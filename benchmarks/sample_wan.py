"""Speed and memory of sampling Wan 2.1 1.3B, 832 x 480, 81 frames, bfloat16.

Random weights; one clip at a time. Two ways are measured: frame by frame in 4
steps and then 2, and three latent frames at a time in 4 steps. Beside each
figure stand

* its limit: on one H100, attention at cuDNN's rate and linear layers at the
  rate of matrix products, resp. convolutions at that rate;
* the aim;
* what the original (NVlabs/rcm) publishes for one H100.

    python benchmarks/sample_wan.py            # one GPU, under 4 minutes
    python benchmarks/sample_wan.py --tiny     # that it runs: seconds on a CPU

Compiling is timed as the difference of the first clip and the second; set
JAX_COMPILATION_CACHE_DIR to see what is left of it in a second run.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import generation
from crcm_jax.chunks import ChunkPattern
from crcm_jax.generation import decode_to_bytes
from crcm_jax.sampling import Step

GIB = 2**30


class Case(NamedTuple):
  """One way to sample, and the figures to stand beside ours on an H100."""

  name: str
  pattern: ChunkPattern
  steps: tuple[int, ...]
  call_limit: float
  """ms of a network call at full history."""
  call_aim: float
  mean_aim: float
  """ms of a call, mean over the clip's chunks."""
  original_rate: float
  original_first: float


CASES = (
  Case("1,1 [4,2,2,...]", ChunkPattern(1, 1), (4, 2), 21, 35, 28, 12.2, 0.40),
  Case("3,3 [4,4,...]", ChunkPattern(3, 3), (4,), 62, 95, 70, 17.4, 0.57),
)


class Row(NamedTuple):
  """A figure and what it is compared with; None where there is nothing."""

  case: str
  what: str
  value: float | None
  limit: float | None = None
  aim: float | None = None
  original: float | None = None

  def __str__(self) -> str:
    cells = (self.value, self.limit, self.aim, self.original)
    shown = ("-" if cell is None else f"{cell:.4g}" for cell in cells)
    return f"{self.case:<16} {self.what:<34}" + "".join(
      f"{cell:>10}" for cell in shown
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description="Times sampling of Wan 1.3B.")
  parser.add_argument("--tiny", action="store_true", help="tiny networks")
  parser.add_argument("--repeat", type=int, default=3, help="calls timed")
  parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
  arguments = parser.parse_args(argv)
  device = jax.devices()[0]
  print(f"{device.device_kind}, JAX {jax.__version__}")
  print(f"{'':<51}{'ours':>10}{'limit':>10}{'aim':>10}{'original':>10}")
  rows: list[Row] = []

  def add(*row: Any, **beside: float) -> None:
    rows.append(Row(*row, **beside))
    print(rows[-1], flush=True)

  start = time.perf_counter()
  networks = generation.random_networks("tiny" if arguments.tiny else "1.3B")
  jax.block_until_ready((networks.params, networks.vae_params))
  add("", "drawing weights, s", time.perf_counter() - start)
  frames, height, width = (21, 32, 48) if arguments.tiny else (81, 480, 832)
  for case in CASES:
    settings = generation.Settings(
      frames=frames,
      height=height,
      width=width,
      pattern=case.pattern,
      steps=case.steps,
    )
    generator = generation.Generator(networks, settings)
    measure_clips(case, generator, add)
    measure_calls(case, generator, arguments.repeat, add)
  measure_vae(networks, generator.shape, arguments.repeat, add)
  peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
  add("", "peak memory, GiB", peak and peak / GIB, aim=40.0)
  if arguments.json is not None:
    about = {"device": device.device_kind, "jax": jax.__version__}
    table = [row._asdict() for row in rows]
    arguments.json.write_text(json.dumps(about | {"rows": table}, indent=2))
  return rows


def measure_clips(case: Case, generator: generation.Generator, add) -> None:
  """Times whole clips: the first compiles."""
  text = generator.networks.embed(["a prompt"])
  frames = generator.settings.frames
  cold, _ = _time_clip(generator, text)
  warm, first = _time_clip(generator, text)
  start = time.perf_counter()
  jax.block_until_ready(list(generator.latents(text)))
  dit = time.perf_counter() - start
  add(case.name, "compiling, s", cold - warm, aim=120.0)
  add(case.name, "first frame, s", first, original=case.original_first)
  add(
    case.name,
    "frames/s, end to end",
    frames / warm,
    original=case.original_rate,
  )
  add(case.name, "frames/s, transformer alone", frames / dit)


def _time_clip(
  generator: generation.Generator, text: np.ndarray
) -> tuple[float, float]:
  """Returns the seconds of a clip, and those to its first frame."""
  start = time.perf_counter()
  frames = generator(text)
  next(frames)
  first = time.perf_counter() - start
  for _ in frames:
    pass
  return time.perf_counter() - start, first


def measure_calls(
  case: Case, generator: generation.Generator, repeat: int, add
) -> None:
  """Times network calls by the latent frames they look back on."""
  networks, shape = generator.networks, generator.shape
  stream, chunk = generator.stream, case.pattern.rest
  conditioning = (jnp.asarray(networks.embed(["a prompt"])), None)
  steps = max(case.steps)
  noise = jnp.zeros((steps, 1, *shape))
  cache: Any = stream.init(networks.params, conditioning, 1, shape[0])
  number = np.float32
  at = Step(np.int32(1), np.int32(0), number(0.9), number(0.5))

  def milliseconds(history: int) -> float:
    seen = jnp.int32(history)
    past = cache._replace(frames=seen, position=seen)
    x = stream.start(noise, np.int32(0), size=chunk)
    times = []
    for _ in range(repeat + 1):  # the first warms up
      start = time.perf_counter()
      for _ in range(2):  # one after another, as in a clip
        x = stream.step(networks.params, conditioning, past, x, noise, at)
      jax.block_until_ready(x)
      times.append((time.perf_counter() - start) / 2)
    return 1000 * min(times[1:])

  histories = range(0, shape[0] - chunk + 1, chunk)
  by_history = {history: milliseconds(history) for history in histories}
  shown = sorted({histories[len(histories) * i // 4] for i in range(4)})
  for history in shown[:-1] if shown[-1] == histories[-1] else shown:
    add(case.name, f"ms a call, {history} frames seen", by_history[history])
  add(
    case.name,
    f"ms a call, {histories[-1]} frames seen",
    by_history[histories[-1]],
    limit=case.call_limit,
    aim=case.call_aim,
  )
  mean = float(np.mean(list(by_history.values())))
  add(case.name, "ms a call, mean over the clip", mean, aim=case.mean_aim)


def measure_vae(
  networks: generation.Networks, shape: tuple[int, ...], repeat: int, add
) -> None:
  """Times the decoder on later latent frames, four RGB frames each."""
  vae, params = networks.vae, networks.vae_params
  latent = jnp.zeros((1, 1, *shape[1:]))
  _, cache = decode_to_bytes(vae, params, latent, None)
  times = []
  for _ in range(repeat + 1):  # the first warms up
    start = time.perf_counter()
    pixels, cache = decode_to_bytes(vae, params, latent, cache)
    jax.block_until_ready(pixels)
    times.append(time.perf_counter() - start)
  each = 1000 * min(times[1:]) / len(pixels)
  add("", "ms a decoded RGB frame", each, limit=4.5, aim=15.0, original=20.0)


if __name__ == "__main__":
  main()
