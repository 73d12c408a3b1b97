"""Plots two runs beside each other, in one HTML file that opens offline.

  python benchmarks/compare_runs.py runs/a runs/b --out compare.html

A run is a stage's workdir, or an experiment's with its stages' in it. Every
number in `metrics.jsonl`, `speed.jsonl` and `samples.jsonl` that either run has
becomes a chart with both on the same axes; a table compares the means over the
last tenth of each run's lines, and the settings that differ are listed.
"""

import argparse
import html
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from crcm_jax import training
from crcm_jax.evaluation import _plots
from crcm_jax.evaluation._style import STYLE
from crcm_jax.training import _config

KINDS = ("metrics", "speed", "samples")


class Curve(NamedTuple):
  """One number of a run over its steps."""

  steps: list[int]
  values: list[float]


class Run(NamedTuple):
  """What a run left behind.

  Attributes:
    name: that tells it from the other.
    curves: by their names, "KIND/NAME", or "STAGE/KIND/NAME" of an experiment.
    config: the settings of its stages.
  """

  name: str
  curves: dict[str, Curve]
  config: dict[str, Any]


def read_run(workdir: pathlib.Path, name: str) -> Run:
  """Reads a run.

  Args:
    workdir: of a stage, or of an experiment.
    name: to call it by.

  Raises:
    FileNotFoundError: if there is no `metrics.jsonl`.
  """
  folders = {"": workdir}
  if not (workdir / "metrics.jsonl").is_file():
    found = sorted(workdir.glob("*/metrics.jsonl"))
    folders = {f"{path.parent.name}/": path.parent for path in found}
  if not folders:
    raise FileNotFoundError(
      "a run must be a workdir of `crcm train`, with a metrics.jsonl in it or"
      f" in its stages' folders; {workdir} is not."
    )
  curves: dict[str, Curve] = {}
  config: dict[str, Any] = {}
  for stage, folder in folders.items():
    for kind in KINDS:
      _collect(curves, f"{stage}{kind}/", folder / f"{kind}.jsonl")
    if (folder / "config.json").is_file():
      config[stage or "stage"] = json.loads(
        (folder / "config.json").read_text()
      )
  return Run(name, curves, config)


def _collect(curves: dict[str, Curve], prefix: str, path: pathlib.Path) -> None:
  for row in training.read_metrics(path):
    for key, value in row.items():
      if key != "step":
        curve = curves.setdefault(prefix + key, Curve([], []))
        curve.steps.append(row["step"])
        curve.values.append(value)


def at_the_end(curve: Curve | None) -> float:
  """Returns the mean over the last tenth of a curve, NaN of none."""
  if curve is None:
    return float("nan")
  return float(np.mean(curve.values[-max(1, len(curve.values) // 10) :]))


def page(runs: Sequence[Run]) -> str:
  """Returns the HTML page that compares two runs."""
  names = list(dict.fromkeys(name for run in runs for name in run.curves))
  if not names:
    raise ValueError("the runs must have logged a step; neither has.")
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>Two runs</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>"
    f"<h1>Two runs</h1>{_legend(runs)}{_settings(runs)}{_charts(runs, names)}"
    f"{_table(runs, names)}</main>\n</body>\n</html>\n"
  )


def _legend(runs: Sequence[Run]) -> str:
  first, other = (html.escape(run.name) for run in runs)
  return (
    f'<p><b class="first">— {first}</b> &nbsp; <b class="other">- -'
    f" {other}</b></p>\n"
  )


def _settings(runs: Sequence[Run]) -> str:
  changed = _config.differences(*(run.config for run in runs))
  items = "".join(f"<li>{html.escape(line)}</li>" for line in changed)
  text = f"<ul>{items}</ul>" if items else "<p>None, but perhaps the code.</p>"
  return f"<h2>Settings that differ</h2>{text}\n"


def _charts(runs: Sequence[Run], names: Sequence[str]) -> str:
  figures = []
  for name in names:
    both = {run.name: run.curves.get(name, Curve([], [])) for run in runs}
    figures.append(
      f"<figure>{_plots.compare_chart(both)}"
      f"<figcaption>{html.escape(name)}</figcaption></figure>"
    )
  return f'<h2>Curves</h2><div class="charts">{"".join(figures)}</div>\n'


def _table(runs: Sequence[Run], names: Sequence[str]) -> str:
  heads = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
  rows = [_row(runs, name) for name in names]
  return (
    "<h2>At the end</h2><p>Means over the last tenth of the lines.</p>"
    f'<div class="scroll"><table><thead><tr><th></th>{heads}<th>ratio</th>'
    f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
  )


def _row(runs: Sequence[Run], name: str) -> str:
  a, b = (at_the_end(run.curves.get(name)) for run in runs)
  with np.errstate(divide="ignore", invalid="ignore"):
    ratio = float(np.float64(b) / np.float64(a))
  cells = "".join(
    f"<td>{value:.4g}</td>" if np.isfinite(value) else "<td>–</td>"
    for value in (a, b, ratio)
  )
  return f"<tr><td>{html.escape(name)}</td>{cells}</tr>"


def names_of(a: pathlib.Path, b: pathlib.Path) -> tuple[str, str]:
  """Returns the shortest endings of two paths that tell them apart."""
  x, y = a.absolute().parts, b.absolute().parts
  for n in range(1, max(len(x), len(y)) + 1):
    short = "/".join(x[-n:]), "/".join(y[-n:])
    if short[0] != short[1]:
      return short
  return f"{short[0]} (first)", f"{short[1]} (second)"


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
  """Writes the page, and returns its path."""
  parser = argparse.ArgumentParser(description="Plots two runs.")
  parser.add_argument("runs", nargs=2, type=pathlib.Path, metavar="WORKDIR")
  parser.add_argument("--out", type=pathlib.Path, default="compare.html")
  arguments = parser.parse_args(argv)
  names = names_of(*arguments.runs)
  try:
    runs = [read_run(*run) for run in zip(arguments.runs, names, strict=True)]
    arguments.out.write_text(page(runs))
  except (OSError, ValueError) as error:
    sys.exit(f"compare_runs.py: {error}")
  print(arguments.out)
  return arguments.out


if __name__ == "__main__":
  main()
