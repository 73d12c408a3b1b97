"""Clips of what `crcm train` left behind."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import data, training
from crcm_jax.training import _networks, _stages


def clip_maker(
  source: str, steps: int | None, frames: int | None
) -> tuple[Callable[[str, int], np.ndarray], Callable[[], dict[str, Any]]]:
  """Returns what makes clips of (caption, seed), and what tells how.

  Args:
    source: an experiment (its last stage), a stage's workdir or a file of
      weights, with [:ema|:live][@STEP].
    steps: of each chunk; None takes the most.
    frames: latent frames; None takes as many as in training.
  """
  origin = _networks.load_source(_of_last_stage(source), workdir=pathlib.Path())
  stage = _stages.stage_of(origin)
  params = jax.device_put(
    _networks.adopt(origin, stage.model, pattern=stage.pattern, name="SOURCE")
  )
  sampler = stage.sampler()

  def make(caption: str, seed: int) -> np.ndarray:
    batch = _batch_of(stage, caption, frames)
    latents = sampler(params, jax.random.key(seed), batch, steps)
    (video,) = np.asarray(stage.dataset.decode(latents))
    return video

  def record() -> dict[str, Any]:
    pattern = stage.pattern
    return {
      "checkpoint_sha256": _params_hash(params),
      "stage": stage.name,
      "pattern": None if pattern is None else dataclasses.asdict(pattern),
      "schedule": {"steps": steps, **dataclasses.asdict(stage.sampling)},
      "frames": frames,
    }

  return make, record


def _params_hash(params: Any) -> str:
  """Returns the SHA-256 of parameters, with their names and dtypes."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    total.update(f"{path} {array.dtype} {array.shape}".encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()


def _of_last_stage(text: str) -> str:
  """Turns a source that names an experiment into that of its last stage."""
  where = _networks.parse_source(text).where
  if not pathlib.Path(where, "experiment.json").exists():
    return text
  config = read_experiment(pathlib.Path(where))["config"]
  return f"{where}/{config['stages'][-1]}{text.removeprefix(where)}"


def _batch_of(
  stage: training.Stage, caption: str, frames: int | None
) -> data.Batch:
  """Returns a batch of one example, whose latents only give a shape."""
  _, usual, *rest = stage.dataset.shapes().x_0.shape
  return data.Batch(
    jnp.zeros((1, frames or usual, *rest)),
    jnp.asarray(stage.dataset.encode([caption])),
    jnp.asarray(stage.dataset.encode([data.NULL_CAPTION])),
  )


def read_experiment(folder: pathlib.Path) -> dict[str, Any]:
  """Reads what an experiment's folder says it is.

  Raises:
    ValueError: if it is none.
  """
  path = folder / "experiment.json"
  if not path.exists():
    raise ValueError(
      f"WORKDIR must be one that `crcm train` made; {str(folder)!r} has no"
      " experiment.json."
    )
  return json.loads(path.read_text())
