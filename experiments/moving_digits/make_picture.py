"""Draws the README's picture: one caption a row, one sampler a column.

    python -m experiments.moving_digits.make_picture runs/quickstart

Columns: the causal teacher at 50 and at 2 steps a chunk, then the student at 4,
2 and 1. All samplers get the same noise key.
"""

import json
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from crcm_jax import data, evaluation, training

OUT = pathlib.Path("docs/images/digits.gif")
CAPTIONS = (
  "four moving down",
  "seven moving left, fast",
  "zero moving right and up",
  "six moving down and left; one moving right",
)
COLUMNS = (
  "teacher, 50 steps",
  "teacher, 2 steps",
  "self_forcing, 4 steps",
  "self_forcing, 2 steps",
  "self_forcing, 1 step",
)


def main(workdir: str) -> None:
  """Samples all captions with each sampler and writes one animation."""
  folder = pathlib.Path(workdir)
  config = json.loads((folder / "experiment.json").read_text())
  experiment = training.read_experiment(config["config"])
  rows = training.samplers(experiment, folder)
  texts = data.encode_captions(CAPTIONS)
  nulls = data.encode_captions([data.NULL_CAPTION] * len(CAPTIONS))
  like: Any = np.zeros((len(CAPTIONS), 9, 8, 8, 16), np.float32)
  batch = data.Batch(like, texts, nulls)
  videos = [
    np.asarray(data.video_from_latents(rows[name](jax.random.key(4), batch)))
    for name in COLUMNS
  ]
  # [columns rows f 32 32 1] -> one canvas a frame, with a dark gap between.
  grid = np.pad(
    np.stack(videos)[..., 0].clip(-1, 1),
    [(0, 0)] * 3 + [(1, 1)] * 2,
    constant_values=-0.5,
  )
  canvas = np.concatenate(
    [np.concatenate(list(row), axis=-1) for row in grid.swapaxes(0, 1)], axis=-2
  )
  OUT.parent.mkdir(exist_ok=True)
  evaluation.write_video(OUT, canvas, fps=6.0, min_size=408)


if __name__ == "__main__":
  main(sys.argv[1])
