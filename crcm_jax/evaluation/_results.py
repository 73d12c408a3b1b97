"""What an evaluation found, and what its columns mean."""

import dataclasses
import json
import math
from typing import Any, NamedTuple

import numpy as np

REAL = "real"
"""Name of the row of held-out real clips, the floor of every score."""


class Metric(NamedTuple):
  """What a column of the results means."""

  name: str
  unit: str
  aim: str
  meaning: str


METRICS: dict[str, Metric] = {
  "frechet": Metric(
    "Fréchet distance",
    "",
    "lower",
    "Distance between the Gaussians fitted to the features of these clips and"
    " of real ones: looks, change over time, and motion.",
  ),
  "digit_accuracy": Metric(
    "Digit accuracy",
    "%",
    "higher",
    "Share of the captioned digits that the classifier sees most clearly.",
  ),
  "motion_error": Metric(
    "Motion error",
    "px/frame",
    "lower",
    "Mean difference between the tracked and the captioned velocity. The floor"
    " holds the tracker's error and the spread of speeds that one word covers.",
  ),
  "diversity": Metric(
    "Diversity",
    "",
    "real",
    "Mean distance between the features of clips whose captions name the same"
    " digits. Below the real value: clips repeat one another.",
  ),
  "drift": Metric(
    "Drift",
    "",
    "zero",
    "Fréchet distance of the last chunk's frames minus that of the first's."
    " Positive: quality is lost over time.",
  ),
  "latency_ms": Metric(
    "Latency",
    "ms/chunk",
    "lower",
    "Wall time of one clip at batch size one, without compilation, divided by"
    " its chunks.",
  ),
  "frames_per_second": Metric(
    "Speed",
    "frames/s",
    "higher",
    "Frames of a clip over the same wall time.",
  ),
}
"""The columns of the results, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """What `evaluate` found.

  Attributes:
    rows: for `REAL` and each sampler, its metrics by the keys of `METRICS`; a
      metric that does not apply is absent.
    captions: the captions of the example videos.
    videos: for each row, example clips in the order of `captions`, uint8
      `[examples, f, h, w]`.
    settings: numbers of clips and components, for the record.
  """

  rows: dict[str, dict[str, float]]
  captions: list[str]
  videos: dict[str, np.ndarray]
  settings: dict[str, Any]

  def to_json(self) -> str:
    """Returns rows, captions and settings as JSON; non-finite becomes null."""
    rows = {
      name: {k: v if math.isfinite(v) else None for k, v in row.items()}
      for name, row in self.rows.items()
    }
    record = {
      "rows": rows,
      "captions": self.captions,
      "settings": self.settings,
    }
    return json.dumps(record, indent=2)

  def to_text(self) -> str:
    """Returns the rows as an aligned table for a terminal."""
    used = [k for k in METRICS if any(k in row for row in self.rows.values())]
    table = [["", *used]] + [
      [name, *(f"{row[k]:.4g}" if k in row else "-" for k in used)]
      for name, row in self.rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
      "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
      for line in table
    ]
    return "\n".join(lines)
