"""Whole evaluations of samplers whose order is known."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import ChunkPattern, data, evaluation

ROOT = pathlib.Path(__file__).parent.parent.parent
WEIGHTS = ROOT / "experiments" / "moving_digits" / "weights"
PATTERN = ChunkPattern(3, 3)
BATCH, FRAMES = 16, 9
CLIPS, REFERENCE = 64, 96


@functools.cache
def _batches():
  """Ten batches of real clips, as the test split's pipeline yields them."""
  batches = []
  for start in range(0, CLIPS + REFERENCE, BATCH):
    clips = [
      data.make_clip(i, split="test", frames=FRAMES)
      for i in range(start, start + BATCH)
    ]
    video = np.stack([clip.video for clip in clips]).astype(np.float32)
    captions = tuple(clip.caption for clip in clips)
    text = data.encode_captions(captions)
    batch = data.Batch(
      jnp.asarray(data.latents_from_video(video / 127.5 - 1)), text, text
    )
    labels = jax.tree.map(
      lambda *leaves: np.stack(leaves), *(clip.labels for clip in clips)
    )
    batches.append(data.LabelledBatch(batch, captions, labels))
  return batches


def _evaluate(samplers, **settings):
  settings = {"num_clips": CLIPS, "num_reference": REFERENCE} | settings
  return evaluation.evaluate(
    samplers,
    _batches(),
    evaluation.load_classifier(WEIGHTS / "classifier.safetensors"),
    key=jax.random.key(0),
    pattern=PATTERN,
    **settings,
  )


def _copy(key, batch):
  del key
  return batch.x_0


def _noisy(key, batch):
  return batch.x_0 + 2 * jax.random.normal(key, batch.x_0.shape)


def _frozen(key, batch):
  del key
  return jnp.repeat(batch.x_0[:, :1], FRAMES, axis=1)


def _other_caption(key, batch):
  del key
  return jnp.roll(batch.x_0, 1, axis=0)


def _worse_with_time(key, batch):
  strength = jnp.linspace(0, 1, FRAMES)[:, None, None, None]
  return batch.x_0 + strength * jax.random.normal(key, batch.x_0.shape)


@functools.cache
def _results():
  return _evaluate(
    {
      "copy": _copy,
      "noisy": _noisy,
      "frozen": _frozen,
      "other caption": _other_caption,
      "worse with time": _worse_with_time,
    }
  )


def test_a_copy_of_real_clips_scores_the_floor():
  rows = _results().rows
  assert next(iter(rows)) == evaluation.REAL
  timing = {"latency_ms", "frames_per_second"}
  copy = {k: v for k, v in rows["copy"].items() if k not in timing}
  assert copy == rows[evaluation.REAL]


def test_each_degradation_shows_in_its_metric():
  rows = _results().rows
  real = rows[evaluation.REAL]
  assert real["digit_accuracy"] > 95
  assert rows["noisy"]["frechet"] > 3 * real["frechet"]
  assert rows["frozen"]["frechet"] > 3 * real["frechet"]
  assert rows["frozen"]["motion_error"] > 3 * real["motion_error"]
  assert rows["other caption"]["digit_accuracy"] < 40
  assert rows["other caption"]["motion_error"] > 3 * real["motion_error"]
  assert rows["worse with time"]["drift"] > 1 + abs(real["drift"])


def test_the_floor_is_near_its_expected_value():
  # Documented bias of d = 20 dimensions; tails heavier than Gaussian add some.
  expected = (20 + 20 * 21 / 4) * (1 / CLIPS + 1 / REFERENCE)
  assert _results().rows[evaluation.REAL]["frechet"] < 1.6 * expected


def test_speed_is_measured_of_every_sampler_but_not_of_real_clips():
  for name, row in _results().rows.items():
    if name == evaluation.REAL:
      assert "latency_ms" not in row
    else:
      seconds = row["latency_ms"] / 1000 * PATTERN.num_chunks(FRAMES)
      assert row["frames_per_second"] == pytest.approx(FRAMES / seconds)


def test_examples_keep_captions_and_videos():
  results = _results()
  assert results.captions == list(_batches()[REFERENCE // BATCH].captions[:4])
  for video in results.videos.values():
    assert video.shape == (4, FRAMES, 32, 32)
    assert video.dtype == np.uint8


def test_results_are_json_and_text():
  results = _results()
  record = json.loads(results.to_json())
  assert record["rows"]["copy"].keys() == set(evaluation.METRICS)
  assert record["settings"]["num_clips"] == CLIPS
  lines = results.to_text().splitlines()
  assert len(lines) == 1 + len(results.rows)
  assert "digit_accuracy" in lines[0]


def test_samplers_that_break_down_still_get_a_row():
  broken = lambda key, batch: jnp.full_like(batch.x_0, jnp.nan)
  named = []
  results = _evaluate(
    {"broken": broken},
    num_clips=20,
    on_row=lambda name, row: named.append(name),
  )
  assert named == [evaluation.REAL, "broken"]
  assert json.loads(results.to_json())["rows"]["broken"]["frechet"] is None


def test_too_few_clips_are_counted():
  with pytest.raises(ValueError, match=r"at least 1000 more clips.*after 64"):
    _evaluate({}, num_clips=1000)


def test_a_sampler_of_another_shape_is_named():
  short = lambda key, batch: batch.x_0[:, :3]
  with pytest.raises(ValueError, match=r"`samplers\['short'\]` must return"):
    _evaluate({"short": short})
