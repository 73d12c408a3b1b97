"""How train steps of Wan2.1 scale over the GPUs of a host.

    python benchmarks/scaling.py --json FILE     # all GPUs, under 10 minutes
    python benchmarks/scaling.py --tiny          # that it runs; on a CPU, with
                      # XLA_FLAGS=--xla_force_host_platform_device_count=8

Wan2.1-1.3B at 480p, 21 latent frames, frame by frame, random weights: the
TF-sCM step and the student's SF-DMD step on 1, 2, 4, 8 GPUs, as many as there
are. Three ways to use n of them:

    weak     fsdp=n, n videos: parameters and videos are split
    strong   context=n, one video: its tokens are split
    mixed    fsdp=n/2, context=2, n/2 videos (of all GPUs only)

Efficiency is tokens a second, beside n times those of one GPU in the same
run. `--ways` leaves some out. Memory is what the compiled step asks for on each
GPU. The shares of collectives are measured in a profiler's trace of one step on
the first GPU: in all, and while nothing else ran there. At 8 GPUs the table
ends with a step of the 14B network (stage 1, TF-sCM) on the first mesh that it
fits.
"""

import argparse
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence

import _steps
import jax

STEPS = ("tf_scm", "sf_dmd")
WAYS = ("one", "weak", "strong", "mixed")
AIMS = {"weak": 0.90, "strong": 0.85}
"""Efficiency asked for on two GPUs."""

LARGE = ("fsdp=8", "fsdp=4,context=2", "fsdp=2,context=4")
"""Meshes for the 14B network, tried in order."""


def ways(devices: int) -> Iterator[tuple[str, dict[str, int], int]]:
  """Yields name, mesh and videos of each way to use up to `devices`."""
  yield "one", {}, 1
  for n in (n for n in (2, 4, 8) if n <= devices):
    yield "weak", dict(fsdp=n), n
    yield "strong", dict(context=n), 1
  most = 2 ** int(math.log2(min(devices, 8)))
  if most > 2:
    yield "mixed", dict(fsdp=most // 2, context=2), most // 2


def main(argv: Sequence[str] | None = None) -> list[_steps.Row]:
  """Measures and prints."""
  options = _options(argv)
  begin = time.perf_counter()
  _steps.start(options.tiny)
  about = _steps.about()
  print(f"{about['device']} x{about['devices']}, JAX {about['jax']}")
  cases = [
    (way, _steps.Case(name=name, mesh=mesh, batch=batch, tiny=options.tiny))
    for way, mesh, batch in ways(jax.device_count())
    if way in options.ways
    for name in options.steps
  ]
  if options.large and jax.device_count() >= 8:
    cases += [("14B", large(mesh, options.tiny)) for mesh in LARGE]
  programs = _steps.compile_all([case for _, case in cases], options.workers)
  print(f"compiled after {time.perf_counter() - begin:.0f} s\n{_HEAD}")
  rows, one, done_large = [], {}, False
  for (way, case), (program, compiled, row) in zip(
    cases, programs, strict=True
  ):
    if way == "14B" and done_large:
      continue
    if time.perf_counter() - begin > options.deadline:
      row.error = row.error or "left out: no time"
    else:
      _steps.measure(
        program,
        compiled,
        row,
        budget_s=options.budget,
        least=1,
        kernels=10 if row.devices > 1 else 0,
      )
    if way == "one" and row.seconds:
      one[case.name] = row.tokens_per_s
    done_large |= way == "14B" and bool(row.seconds)
    rows.append(row)
    efficiency = efficiency_of(row, one)
    print(line(way, row, efficiency), flush=True)
    if options.json:
      table = [
        row.as_dict() | dict(way=w, efficiency=efficiency_of(row, one))
        for (w, _), row in zip(cases, rows, strict=False)
      ]
      options.json.write_text(
        json.dumps(dict(about=about, rows=table), indent=1) + "\n"
      )
  return rows


def large(mesh: str, tiny: bool) -> _steps.Case:
  """Returns the 14B network's first stage on a mesh."""
  split = _steps.parse_mesh(mesh)
  return _steps.Case(
    name="tf_scm",
    size="14b",
    mesh=split,
    batch=split.get("fsdp", 1),
    remat="full",
    tiny=tiny,
  )


def efficiency_of(row: _steps.Row, one: dict[str, float]) -> float | None:
  """Returns tokens a second beside those of as many single GPUs."""
  name = row.case.name
  if not row.seconds or name not in one or row.case.size != "1.3b":
    return None
  return row.tokens_per_s / (row.devices * one[name])


_HEAD = (
  f"{'way':7} {'step':8} {'mesh':18} {'videos':>6} {'compile':>8} {'s':>7}"
  f" {'tokens/s':>9} {'use':>6} {'effic.':>7} {'aim':>5} {'GiB':>6}"
  f" {'collectives':>11} {'exposed':>8}"
)


def line(way: str, row: _steps.Row, efficiency: float | None) -> str:
  """Returns the table's line of a step."""
  case = row.case
  name = case.name + (" 14B" if case.size == "14b" else "")
  start = f"{way:7} {name:8} {_steps.mesh_name(case.mesh):18} {case.batch:6}"
  if row.error:
    return f"{start}  failed: {row.error}"
  compiling = (row.lower_s or 0.0) + (row.compile_s or 0.0)
  percent = lambda x: "" if x is None else f"{100 * x:.1f}%"
  shares = row.collectives
  aim = AIMS.get(way) if row.devices == 2 else None
  return (
    f"{start} {compiling:8.1f} {row.median_s:7.3f} {row.tokens_per_s:9.0f}"
    f" {percent(row.utilisation):>6} {percent(efficiency):>7}"
    f" {percent(aim):>5} {row.peak_gib:6.1f}"
    f" {percent(shares and shares.share):>11}"
    f" {percent(shares and shares.exposed):>8}"
  )


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="Scales Wan's train steps.")
  add = parser.add_argument
  add("--steps", type=lambda s: s.split(","), default=list(STEPS))
  add("--ways", type=lambda s: s.split(","), default=list(WAYS))
  add("--budget", type=float, default=8.0, help="seconds of repetitions")
  add("--deadline", type=float, default=540.0, help="start no step after it")
  add("--workers", type=int, default=8, help="steps compiled at a time")
  add("--large", action=argparse.BooleanOptionalAction, default=True)
  add("--tiny", action="store_true", help="tiny sizes, to see that it runs")
  add("--json", type=pathlib.Path, help="writes the rows here")
  return parser.parse_args(argv)


if __name__ == "__main__":
  main()
