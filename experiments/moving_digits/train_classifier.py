"""Trains the frame classifier that evaluation ships with, on the CPU.

    python -m experiments.moving_digits.train_classifier

Frames come from the train split: one digit, or two that may cross, with faint
noise at random, so that accuracy measures which digit is drawn and not how
clean its background is. Test frames show scans that no training frame shows.
Beside the weights it writes their config and result, the log, and the hash.
Takes about five minutes on two cores.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import sys
import time
from typing import Literal

import jax
import numpy as np
import optax

from crcm_jax import data, evaluation
from crcm_jax._typing import Params

FOLDER = pathlib.Path(__file__).parent / "weights"
NETWORK = evaluation.FrameClassifier()
NOISE_STD = 0.15  # the largest, in units of the canvas' range [-1, 1]


def main(argv: list[str] | None = None) -> None:
  """Trains, tests, and writes all files."""
  settings = _settings(argv)
  train = frames_and_digits("train", settings.train_clips, frames=21)
  test = frames_and_digits("test", settings.test_clips, frames=9)
  optimizer = optax.adamw(
    optax.cosine_decay_schedule(settings.learning_rate, settings.steps),
    weight_decay=settings.weight_decay,
  )
  init = jax.jit(NETWORK.init)
  params = init(jax.random.key(settings.seed), train[0][:1])["params"]
  opt_state = optimizer.init(params)
  step = jax.jit(functools.partial(_step, optimizer))
  rng = np.random.default_rng(settings.seed)

  log, start = [], time.time()
  for i in range(settings.steps):
    chosen = rng.integers(len(train[0]), size=settings.batch_size)
    frames = _augment(rng, train[0][chosen])
    params, opt_state, loss = step(params, opt_state, frames, train[1][chosen])
    if (i + 1) % settings.log_every == 0:
      scores = accuracy(params, *test)
      log.append({"step": i + 1, "loss": float(loss), **scores})
      print(json.dumps(log[-1]), f"{time.time() - start:.0f} s", flush=True)
  _write(settings, params, log)


def frames_and_digits(
  split: Literal["train", "test"], clips: int, *, frames: int
) -> tuple[np.ndarray, np.ndarray]:
  """Draws clips and takes them apart.

  Args:
    split: "train" or "test".
    clips: how many.
    frames: of each clip.

  Returns:
    Frames in [-1, 1], float32 `[clips * frames, h, w]`, and the digits visible
    in each, bool `[clips * frames, 10]`; a clip's frames lie side by side.
  """
  drawn = [data.make_clip(i, split=split, frames=frames) for i in range(clips)]
  video = np.stack([clip.video[..., 0] for clip in drawn])
  visible, _ = evaluation.captioned_motion([clip.caption for clip in drawn])
  pixels = video.reshape(-1, *video.shape[2:]).astype(np.float32) / 127.5 - 1
  return pixels, visible.repeat(frames, axis=0)


def accuracy(
  params: Params, frames: np.ndarray, visible: np.ndarray
) -> dict[str, float]:
  """Scores single frames: `digits` as in evaluation, `exact` all or nothing."""
  outputs = evaluation.Classifier(params, NETWORK)(frames[:, None])
  said = outputs.probabilities[:, 0] > 0.5
  return {
    "digits": evaluation.digit_accuracy(outputs.probabilities, visible),
    "exact": float((said == visible).all(axis=1).mean()),
  }


def _settings(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--steps", type=int, default=3000)
  parser.add_argument("--batch_size", type=int, default=256)
  parser.add_argument("--learning_rate", type=float, default=2e-3)
  parser.add_argument("--weight_decay", type=float, default=1e-2)
  parser.add_argument("--train_clips", type=int, default=8192)
  parser.add_argument("--test_clips", type=int, default=512)
  parser.add_argument("--log_every", type=int, default=250)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path, default=FOLDER)
  return parser.parse_args(argv)


def _augment(rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
  """Adds noise of a random strength to each frame; half of them stay clean."""
  std = NOISE_STD * np.maximum(rng.uniform(-1, 1, (len(frames), 1, 1)), 0)
  return frames + (std * rng.normal(size=frames.shape)).astype(frames.dtype)


def _step(optimizer, params, opt_state, frames, visible):
  """One gradient step; returns the loss before it."""
  loss_of = functools.partial(evaluation.classifier_loss, NETWORK)
  loss, gradient = jax.value_and_grad(loss_of)(params, frames, visible)
  updates, opt_state = optimizer.update(gradient, opt_state, params)
  return optax.apply_updates(params, updates), opt_state, loss


def _write(settings: argparse.Namespace, params, log: list[dict]) -> None:
  """Writes weights in bfloat16 and, beside them, how they came about."""
  folder: pathlib.Path = settings.folder
  weights = folder / "classifier.safetensors"
  evaluation.save_classifier(weights, evaluation.Classifier(params, NETWORK))
  record = {
    "command": " ".join(
      ["python -m experiments.moving_digits.train_classifier", *sys.argv[1:]]
    ),
    "settings": {k: v for k, v in vars(settings).items() if k != "folder"},
    "held_out": {name: log[-1][name] for name in ("digits", "exact")},
    "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
  }
  (folder / "classifier.json").write_text(json.dumps(record, indent=2) + "\n")
  lines = "".join(json.dumps(row) + "\n" for row in log)
  (folder / "classifier.log").write_text(lines)
  digest = hashlib.sha256(weights.read_bytes()).hexdigest()
  hash_line = f"{digest}  {weights.name}\n"  # what `sha256sum --check` reads
  (folder / "classifier.sha256").write_text(hash_line)


if __name__ == "__main__":
  main()
