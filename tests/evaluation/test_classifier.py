"""The frame classifier: shipped weights, files, and the script behind them."""

import hashlib
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import data, evaluation, models

ROOT = pathlib.Path(__file__).parent.parent.parent
FOLDER = ROOT / "experiments" / "moving_digits"
SHIPPED = FOLDER / "weights" / "classifier.safetensors"


@pytest.fixture(scope="module")
def script():
  return runpy.run_path(str(FOLDER / "train_classifier.py"))


@pytest.fixture(scope="module")
def small():
  """A classifier of few parameters, not trained."""
  network = evaluation.FrameClassifier(widths=(4,), num_features=5)
  variables = jax.jit(network.init)(jax.random.key(0), jnp.ones((1, 32, 32)))
  return evaluation.Classifier(variables["params"], network)


def test_shipped_weights_are_those_that_were_logged():
  digest = hashlib.sha256(SHIPPED.read_bytes()).hexdigest()
  assert SHIPPED.with_suffix(".sha256").read_text().split()[0] == digest
  assert SHIPPED.stat().st_size < 300_000
  record = json.loads(SHIPPED.with_suffix(".json").read_text())
  last = SHIPPED.with_suffix(".log").read_text().splitlines()[-1]
  assert record["held_out"].items() <= json.loads(last).items()


def test_shipped_classifier_reads_held_out_clips():
  clips = [data.make_clip(i, split="test", frames=9) for i in range(64)]
  video = np.stack([clip.video[..., 0] for clip in clips]) / np.float32(127.5)
  digits, _ = evaluation.captioned_motion([clip.caption for clip in clips])
  outputs = evaluation.load_classifier(SHIPPED)(video - 1)
  assert outputs.features.shape == (64, 9, 64)
  assert evaluation.digit_accuracy(outputs.probabilities, digits) > 0.95


def test_script_trains_and_writes_all_files(script, tmp_path):
  settings = "--steps=2 --batch_size=8 --train_clips=2 --test_clips=2"
  script["main"]([*settings.split(), "--log_every=1", f"--folder={tmp_path}"])
  names = {path.name for path in tmp_path.iterdir()}
  suffixes = ("json", "log", "safetensors", "sha256")
  assert names == {f"classifier.{suffix}" for suffix in suffixes}
  log = (tmp_path / "classifier.log").read_text().splitlines()
  assert [json.loads(line)["step"] for line in log] == [1, 2]
  classifier = evaluation.load_classifier(tmp_path / "classifier.safetensors")
  assert (
    classifier(np.zeros((1, 2, 32, 32), np.float32)).features.shape[2] == 64
  )


def test_save_and_load_keep_the_network_and_its_parameters(tmp_path, small):
  evaluation.save_classifier(tmp_path / "a.safetensors", small)
  loaded = evaluation.load_classifier(tmp_path / "a.safetensors")
  assert loaded.network == small.network
  rounded = lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32)
  for a, b in zip(
    jax.tree.leaves(loaded.params), jax.tree.leaves(small.params), strict=True
  ):
    np.testing.assert_array_equal(a, rounded(b))


def test_other_parameters_are_refused(tmp_path):
  path = tmp_path / "a.safetensors"
  models.save_params(path, {"a": jnp.zeros(2)}, {})
  with pytest.raises(ValueError, match="`path` must hold a frame classifier"):
    evaluation.load_classifier(path)


def test_loss_is_the_binary_cross_entropy(small):
  frames = np.random.default_rng(1).normal(size=(3, 32, 32)).astype(np.float32)
  visible = np.arange(30).reshape(3, 10) % 3 == 0
  p = small(frames[:, None]).probabilities[:, 0].astype(np.float64)
  expected = -np.mean(np.where(visible, np.log(p), np.log(1 - p)))
  loss = evaluation.classifier_loss(
    small.network, small.params, jnp.asarray(frames), jnp.asarray(visible)
  )
  assert float(loss) == pytest.approx(expected, rel=1e-5)
