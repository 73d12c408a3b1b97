"""Speed and memory of sampling Wan 2.1 1.3B, 832 x 480, 81 frames, bfloat16.

Random weights; one clip at a time. Two ways are measured: frame by frame in 4
steps and then 2, and three latent frames at a time in 4 steps. Beside each
figure stand

* its limit: on one H100, attention at cuDNN's rate and linear layers at the
  rate of matrix products, resp. convolutions at that rate;
* the aim;
* what the original (NVlabs/rcm) publishes for one H100.

    python benchmarks/sample_wan.py --json FILE  # one GPU, about 3 minutes
    python benchmarks/sample_wan.py --tiny       # that it runs: on a CPU

A part that fails is named, and the others run; FILE is written after each.
`--parts calls` measures the transformer alone. To see what is left of compiling
in a second run, set JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import pathlib
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import generation
from crcm_jax.chunks import ChunkPattern
from crcm_jax.generation import decode_to_bytes
from crcm_jax.sampling import Step

GIB = 2**30
_COMPILED = "/jax/core/compile/backend_compile_duration"


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


class Report:
  """The rows so far, printed and kept; and what went wrong."""

  def __init__(self, path: pathlib.Path | None):
    """Says where this runs, and begins."""
    device = jax.devices()[0]
    self.rows: list[Row] = []
    self.failed: list[str] = []
    self._about = {
      "device": device.device_kind,
      "jax": jax.__version__,
      "date": datetime.date.today().isoformat(),
      "command": shlex.join(["python", *sys.argv]),
    }
    self._path = path
    self._start = time.perf_counter()
    print(f"{device.device_kind}, JAX {jax.__version__}")
    print(f"{'':<51}{'ours':>10}{'limit':>10}{'aim':>10}{'original':>10}")

  def add(self, *row: Any, **beside: float) -> None:
    """Adds a `Row`."""
    self.rows.append(Row(*row, **beside))
    print(self.rows[-1], flush=True)

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """Goes on after an error, and saves what there is."""
    print(f"[{time.perf_counter() - self._start:6.1f} s] {name}", flush=True)
    try:
      yield
    except Exception:  # whatever it is, the other parts are worth having
      traceback.print_exc()
      self.failed.append(name)
    if self._path is not None:
      rows = [row._asdict() for row in self.rows]
      table = {**self._about, "failed": self.failed, "rows": rows}
      self._path.write_text(json.dumps(table, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> Report:
  """Measures and prints."""
  parser = argparse.ArgumentParser(description="Times sampling of Wan 1.3B.")
  parser.add_argument("--tiny", action="store_true", help="tiny networks")
  parser.add_argument("--repeat", type=int, default=2, help="calls timed")
  parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
  parts = ("calls", "decoder", "clips")
  parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
  arguments = parser.parse_args(argv)
  report = Report(arguments.json)
  begin = time.perf_counter()
  networks = generation.random_networks("tiny" if arguments.tiny else "1.3B")
  jax.block_until_ready((networks.params, networks.vae_params))
  report.add("", "drawing weights, s", time.perf_counter() - begin)
  text = networks.embed(["a prompt"])
  generators = {case: _generator(case, networks, arguments) for case in CASES}
  if "calls" in arguments.parts:
    for case, generator in generators.items():
      with report.part(f"{case.name}, compiling"):
        measure_compiling(case, generator, text, report)
      with report.part(f"{case.name}, calls"):
        measure_calls(case, generator, text, arguments.repeat, report)
  if "decoder" in arguments.parts:
    with report.part("decoder"):
      shape = generators[CASES[0]].shape
      measure_vae(networks, shape, arguments.repeat, report)
  if "clips" in arguments.parts:
    for case, generator in generators.items():
      with report.part(f"{case.name}, clips"):
        measure_clips(case, generator, text, report)
  with report.part("memory"):
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    report.add("", "peak memory, GiB", peak and peak / GIB, aim=40.0)
    spent = [r.value for r in report.rows if r.what == "compiling, s"]
    report.add("", "compiling in all, s", sum(filter(None, spent)), aim=120.0)
  return report


def _generator(
  case: Case, networks: generation.Networks, arguments: argparse.Namespace
) -> generation.Generator:
  frames, height, width = (21, 32, 48) if arguments.tiny else (81, 480, 832)
  settings = generation.Settings(
    frames=frames,
    height=height,
    width=width,
    pattern=case.pattern,
    steps=case.steps,
  )
  return generation.Generator(networks, settings)


def measure_compiling(
  case: Case, generator: generation.Generator, text: np.ndarray, report: Report
) -> None:
  """Times the first latents of the first clip against those of the second."""

  def seconds() -> float:
    start = time.perf_counter()
    chunks = itertools.islice(generator.latents(text), 3)
    jax.block_until_ready(list(chunks))
    return time.perf_counter() - start

  report.add(case.name, "compiling, s", seconds() - seconds(), aim=120.0)


def measure_clips(
  case: Case, generator: generation.Generator, text: np.ndarray, report: Report
) -> None:
  """Times whole clips, and counts what is compiled meanwhile."""
  generation.warm_up(generator, text)
  compiled: list[str] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event == _COMPILED:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    speed = generation.measure_speed(generator, text)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  name, first, rate = case.name, case.original_first, case.original_rate
  report.add(name, "first frame, s", speed.first, original=first)
  report.add(name, "frames/s, end to end", speed.rate, original=rate)
  report.add(name, "frames/s, transformer alone", speed.transformer_rate)
  anew = "programs compiled in a later clip"
  report.add(name, anew, float(len(compiled)), aim=0.0)


def measure_calls(
  case: Case,
  generator: generation.Generator,
  text: np.ndarray,
  repeat: int,
  report: Report,
) -> None:
  """Times network calls by the latent frames they look back on."""
  networks, shape = generator.networks, generator.shape
  stream, chunk = generator.stream, case.pattern.rest
  conditioning = (jnp.asarray(text), None)
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
  most = histories[-1]
  for seen in sorted(
    {histories[len(histories) * i // 3] for i in range(3)} - {most}
  ):
    what = f"ms a call, {seen} frames seen"
    report.add(case.name, what, by_history[seen])
  what = f"ms a call, {most} frames seen"
  limits = dict(limit=case.call_limit, aim=case.call_aim)
  report.add(case.name, what, by_history[most], **limits)
  mean = float(np.mean(list(by_history.values())))
  report.add(
    case.name, "ms a call, mean over the clip", mean, aim=case.mean_aim
  )


def measure_vae(
  networks: generation.Networks,
  shape: tuple[int, ...],
  repeat: int,
  report: Report,
) -> None:
  """Times the decoder on later latent frames, four RGB frames each."""
  vae, params = networks.vae, networks.vae_params
  latent = jnp.zeros((1, 1, *shape[1:]))
  begin = time.perf_counter()
  _, cache = decode_to_bytes(vae, params, latent, None)
  pixels, cache = decode_to_bytes(vae, params, latent, cache)
  jax.block_until_ready(pixels)
  report.add("", "compiling, s", time.perf_counter() - begin, aim=120.0)
  times = []
  for _ in range(repeat + 1):
    start = time.perf_counter()
    pixels, cache = decode_to_bytes(vae, params, latent, cache)
    jax.block_until_ready(pixels)
    times.append(time.perf_counter() - start)
  each = 1000 * min(times) / len(pixels)
  report.add(
    "", "ms a decoded RGB frame", each, limit=4.5, aim=15.0, original=20.0
  )


if __name__ == "__main__":
  sys.exit(bool(main().failed))
