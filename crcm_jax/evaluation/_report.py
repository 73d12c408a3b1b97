"""The report: one HTML file that opens offline, without scripts.

Videos are embedded as looping gifs of the canvas' own size, enlarged by the
browser. Readers who ask their system for less motion see the frames side by
side instead.
"""

import base64
import datetime
import html
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from crcm_jax import _version
from crcm_jax.evaluation import _plots, _video
from crcm_jax.evaluation._results import METRICS, REAL, Results
from crcm_jax.evaluation._style import STYLE

_FPS = 6.0
_AIMS = {
  "lower": "lower is better",
  "higher": "higher is better",
  "real": "aim: the real value",
  "zero": "aim: zero",
}


def write_report(
  path: str | os.PathLike[str],
  results: Results,
  *,
  command: str,
  config: Any,
  title: str = "Distilling a causal video model",
  curves: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
  device: str | None = None,
  date: datetime.datetime | None = None,
) -> pathlib.Path:
  """Writes the report as one HTML file, and its numbers beside it as JSON.

  Args:
    path: of the file, such as `WORKDIR/report.html`; its folder must exist.
      The numbers go to the same name with the suffix `.json`.
    results: what `evaluate` returned. A row without a metric, or without
      videos, leaves its place empty.
    command: the command that made the run.
    config: its resolved config; shown as JSON if it is a mapping, otherwise
      as text.
    title: the page's heading.
    curves: for each stage, the rows of its `metrics.jsonl` (see
      `training.read_metrics`); each metric called `loss`, or whose name ends
      so, becomes a chart.
    device: what computed; this process' devices if not given.
    date: of the run; now if not given.

  Returns:
    The path of the report.

  Raises:
    FileNotFoundError: if the folder is missing.
    PermissionError: if the folder does not let us write.
  """
  path = pathlib.Path(path)
  date = date or datetime.datetime.now(datetime.UTC)
  sections = [
    _header(title, device or _device(), date),
    _videos(results),
    _table(results),
    _curves(curves or {}),
    _origin(command, config, results.settings),
  ]
  page = (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    f"<body>\n<main>\n{''.join(sections)}</main>\n</body>\n</html>\n"
  )
  _video.write_whole(path.with_suffix(".json"), results.to_json().encode())
  _video.write_whole(path, page.encode())
  return path


def _device() -> str:
  kinds = [device.device_kind for device in jax.devices()]
  return f"{len(kinds)} x {kinds[0]}, {os.cpu_count()} CPU cores"


def _header(title: str, device: str, date: datetime.datetime) -> str:
  return (
    f"<header><h1>{html.escape(title)}</h1><p>{html.escape(device)} ·"
    f' <time datetime="{date.isoformat(timespec="seconds")}">'
    f"{date:%Y-%m-%d %H:%M %Z}</time> · crcm_jax"
    f" {_version.__version__}</p></header>\n"
  )


def _videos(results: Results) -> str:
  """Shows, for each caption, the clip of every sampler side by side."""
  clips = [
    f"<section><h3>“{html.escape(caption)}”</h3>"
    f'<div class="clips">{_clips_of(results, i)}</div></section>\n'
    for i, caption in enumerate(results.captions)
  ]
  note = (
    "Each row has one caption; real clips show another start than the samplers,"
    " which know the caption alone."
  )
  return f"<h2>Videos</h2><p>{note}</p>\n{''.join(clips)}"


def _clips_of(results: Results, i: int) -> str:
  figures = []
  for name in results.rows:
    videos = results.videos.get(name, ())
    picture = _picture(videos[i], name) if i < len(videos) else _MISSING
    label = html.escape(name)
    figures.append(
      f"<figure>{picture}<figcaption>{label}</figcaption></figure>"
    )
  return "".join(figures)


_MISSING = '<div class="missing">no video</div>'


def _picture(video: np.ndarray, name: str) -> str:
  """Returns a moving picture, still for those who want less motion."""
  columns = math.ceil(math.sqrt(len(video)))
  sheet = _video.contact_sheet(video, columns=columns)
  still = _data_uri("image/png", _video.encode_video(sheet[None], ".png"))
  moving = _data_uri("image/gif", _video.encode_video(video, ".gif", fps=_FPS))
  h, w = video.shape[1:3]
  return (
    f'<picture><source media="(prefers-reduced-motion: reduce)"'
    f' srcset="{still}"><img src="{moving}" width="{4 * w}" height="{4 * h}"'
    f' alt="Clip of {html.escape(name)}"></picture>'
  )


def _data_uri(kind: str, data: bytes) -> str:
  return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _table(results: Results) -> str:
  """Shows all numbers: a row for each sampler, a column for each metric."""
  used = [k for k in METRICS if any(k in row for row in results.rows.values())]
  best = {key: _best(results, key) for key in used}
  head = "".join(_column_head(key) for key in used)
  body = "".join(
    f"<tr{' class=floor' if name == REAL else ''}>"
    f'<th scope="row">{html.escape(name)}</th>'
    + "".join(_cell(row.get(key), best[key]) for key in used)
    + "</tr>\n"
    for name, row in results.rows.items()
  )
  meanings = "".join(
    f"<dt>{METRICS[key].name}</dt><dd>{METRICS[key].meaning}</dd>\n"
    for key in used
  )
  note = (
    "The first row holds real clips that were held out: no sampler can be"
    " expected to score better. The best other value is bold."
  )
  return (
    f'<h2>Numbers</h2><p>{note}</p>\n<div class="scroll"><table><thead><tr>'
    f'<th scope="col">Clips</th>{head}</tr></thead>\n<tbody>{body}</tbody>'
    f"</table></div>\n<details><summary>What the columns mean</summary>"
    f"<dl>{meanings}</dl></details>\n"
  )


def _column_head(key: str) -> str:
  metric = METRICS[key]
  unit = f" [{metric.unit}]" if metric.unit else ""
  return (
    f'<th scope="col">{metric.name}{unit}<small>{_AIMS[metric.aim]}</small>'
    "</th>"
  )


def _best(results: Results, key: str) -> float | None:
  """Returns the value closest to the metric's aim among the samplers."""
  values = [
    row[key]
    for name, row in results.rows.items()
    if name != REAL and math.isfinite(row.get(key, math.nan))
  ]
  aims = {
    "lower": lambda v: v,
    "higher": lambda v: -v,
    "real": lambda v: abs(v - results.rows.get(REAL, {}).get(key, math.nan)),
    "zero": abs,
  }
  return min(values, key=aims[METRICS[key].aim], default=None)


def _cell(value: float | None, best: float | None) -> str:
  if value is None or not math.isfinite(value):
    return "<td>–</td>"
  text = f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
  return f"<td><b>{text}</b></td>" if value == best else f"<td>{text}</td>"


def _curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
  charts = [
    f"<figure>{_plots.line_chart(steps, values, name=f'{stage}, {name}')}"
    f"<figcaption>{html.escape(stage)}: {html.escape(name)}</figcaption>"
    "</figure>\n"
    for stage, rows in curves.items()
    for name, (steps, values) in _losses(rows).items()
  ]
  if not charts:
    return ""
  return f'<h2>Losses</h2><div class="charts">{"".join(charts)}</div>\n'


def _losses(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, tuple[list[float], list[float]]]:
  """Returns steps and values of each metric whose name ends in `loss`."""
  losses: dict[str, tuple[list[float], list[float]]] = {}
  for row in rows:
    for name, value in row.items():
      if name.endswith("loss"):
        steps, values = losses.setdefault(name, ([], []))
        steps.append(float(row["step"]))
        values.append(float(value))
  return losses


def _origin(command: str, config: Any, settings: Mapping[str, Any]) -> str:
  """Shows what made the run, so that it can be made again."""
  counts = ", ".join(
    f"{name.replace('_', ' ')} {value}" for name, value in settings.items()
  )
  if isinstance(config, Mapping):
    config = json.dumps(config, indent=2, default=str)
  return (
    f"<h2>How this was made</h2>\n<pre><code>{html.escape(command)}</code>"
    f"</pre>\n<p>Evaluation: {html.escape(counts)}.</p>\n<details><summary>"
    f"Resolved config</summary><pre><code>{html.escape(str(config))}</code>"
    "</pre></details>\n"
  )
