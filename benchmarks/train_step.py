"""Time, memory and utilisation of Wan2.1's train steps on one GPU.

    python benchmarks/train_step.py                     # all four steps
    python benchmarks/train_step.py --steps tf_scm --kernels 25
    python benchmarks/train_step.py --mesh fsdp=2       # on two GPUs
    python benchmarks/train_step.py --tiny              # that it runs

Wan2.1-1.3B at 480p: 21 latent frames of 1,560 tokens, frame by frame, one
video, a guided teacher of the same size, random weights. The steps:

    tf_scm   student by consistency in continuous time
    tf_dcm   student by consistency in discrete time
    sf_dmd   student by distribution matching, its rollout of 4 steps a chunk
    critic   fake score, on a rollout of 4 steps a chunk

Utilisation counts necessary operations only (`_necessary.py`) against the 989
TFLOP/s of dense bfloat16; the limit is their time at that rate. Memory is what
the compiled step asks for. Steps are compiled side by side, then timed one
after the other; one that fails does not stop the others, one that does not fit
is tried with the next policy of `--remat`. Aims and the original
implementation's times (estimated from its measured parts) are for one H100.
"""

import argparse
import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

import _steps
import jax

ORIGINAL = {"tf_scm": 20.0, "tf_dcm": 10.0}
"""Seconds of the original implementation on one H100."""

AIMS = {"tf_scm": "33 %"}

_REMAT = "outputs,attention,full"


def main(argv: Sequence[str] | None = None) -> list[_steps.Row]:
  """Measures and prints."""
  options = _options(argv)
  _steps.start(options.tiny)
  about = _steps.about()
  print(f"{about['device']} x{about['devices']}, JAX {about['jax']}")
  cases = [
    _steps.Case(
      name=name,
      pattern=options.pattern,
      batch=options.batch,
      mesh=options.mesh,
      remat=options.remat[0],
      tiny=options.tiny,
    )
    for name in options.steps
  ]
  programs = _steps.compile_all(cases)
  print(_HEAD)
  rows = []
  for program, compiled, row in programs:
    settings = dict(budget_s=options.budget, kernels=options.kernels)
    _steps.measure(program, compiled, row, **settings)
    for remat in options.remat[1:]:
      if not row.lacks_memory:
        break
      print(f"{line(row)}\n{'':8} so with remat={remat!r}:", flush=True)
      case = dataclasses.replace(program.case, remat=remat)
      ((program, compiled, row),) = _steps.compile_all([case])
      _steps.measure(program, compiled, row, **settings)
    rows.append(row)
    print(line(row), flush=True)
    for kernel in row.kernels:
      print(f"    {kernel.ms:9.2f} ms {kernel.calls:6} x {kernel.name[:90]}")
    if options.json:
      table = dict(about=about, rows=[row.as_dict() for row in rows])
      options.json.write_text(json.dumps(table, indent=1) + "\n")
  print(verdict(rows), flush=True)
  return rows


_HEAD = (
  f"{'step':8} {'compile':>8} {'min s':>7} {'median':>7} {'limit':>6}"
  f" {'PFLOP':>6} {'use':>6} {'aim':>5} {'GiB':>6} {'state':>6} {'orig. s':>7}"
  f" {'remat':>9}"
)


def line(row: _steps.Row) -> str:
  """Returns the table's line of a step."""
  name = row.case.name
  if row.error:
    asked = f"; it asks for {row.peak_gib:.1f} GiB" if row.peak_gib else ""
    return f"{name:8} failed{asked}: {row.error}"
  limit = row.flops / (_steps.PEAK * row.devices)
  compiling = (row.lower_s or 0.0) + (row.compile_s or 0.0)
  return (
    f"{name:8} {compiling:8.1f} {row.min_s:7.3f} {row.median_s:7.3f}"
    f" {limit:6.3f} {row.flops / 1e15:6.3f} {100 * row.utilisation:5.1f}%"
    f" {AIMS.get(name, ''):>5} {row.peak_gib:6.1f} {row.state_gib:6.1f}"
    f" {ORIGINAL.get(name, ''):>7} {row.case.remat:>9}"
  )


def verdict(rows: Sequence[_steps.Row]) -> str:
  """Compares the two ways of consistency."""
  took = {row.case.name: row.median_s for row in rows if row.seconds}
  if not {"tf_scm", "tf_dcm"} <= took.keys():
    return ""
  ratio = took["tf_scm"] / took["tf_dcm"]
  return f"TF-sCM takes {ratio:.2f} times as long as TF-dCM (aim: at most 1.1)."


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description="Times Wan's train steps.")
  add = parser.add_argument
  add("--steps", type=_names, default=list(_steps.STEPS), help="with commas")
  add("--pattern", type=_pair, default=(1, 1), help="FIRST,REST frames")
  add("--batch", type=int, default=None, help="videos; one a group of devices")
  add("--mesh", type=_steps.parse_mesh, default={}, help="fsdp=2,context=2")
  add("--remat", type=_words, default=_words(_REMAT), help="what layers keep")
  add("--budget", type=float, default=15.0, help="seconds of repetitions")
  add("--kernels", type=int, default=0, help="longest kernels to list")
  add("--tiny", action="store_true", help="tiny sizes, to see that it runs")
  add("--json", type=pathlib.Path, help="writes the rows here")
  options = parser.parse_args(argv)
  if math.prod(options.mesh.values()) > jax.device_count():
    options.mesh = {}
  if options.batch is None:
    axes = ("data", "fsdp")
    options.batch = math.prod(options.mesh.get(axis, 1) for axis in axes)
  return options


def _words(text: str) -> list[str]:
  return text.split(",")


def _names(text: str) -> list[str]:
  names = text.split(",")
  if unknown := [name for name in names if name not in _steps.STEPS]:
    raise argparse.ArgumentTypeError(
      f"steps are {list(_steps.STEPS)}; got {unknown}"
    )
  return names


def _pair(text: str) -> tuple[int, int]:
  first, rest = map(int, text.split(","))
  return first, rest


if __name__ == "__main__":
  main()
