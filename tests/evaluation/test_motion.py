"""Tracking digits, and the error against what captions say."""

import functools

import numpy as np
import pytest

from crcm_jax import data, evaluation
from crcm_jax.evaluation import _motion

FRAMES = 9


@functools.cache
def _clips(count=80):
  return [data.make_clip(i, split="test", frames=FRAMES) for i in range(count)]


@functools.cache
def _video():
  video = np.stack([clip.video[..., 0] for clip in _clips()])
  return video.astype(np.float32) / 127.5 - 1


@functools.cache
def _captioned():
  return evaluation.captioned_motion([clip.caption for clip in _clips()])


def _error(video, captioned):
  """Returns the mean error of clips with one and with two digits."""
  count = _captioned()[0].sum(axis=1)
  error = evaluation.motion_error(video, captioned)
  return np.array([error[count == k].mean() for k in (1, 2)])


def test_captions_are_read_as_digits_and_velocities():
  digits, velocity = evaluation.captioned_motion(
    [
      "seven moving left and up, fast; two moving down",
      "one moving right, slowly",
    ]
  )
  assert [*np.flatnonzero(digits[0])] == [2, 7]
  assert [*np.flatnonzero(digits[1])] == [1]
  diagonal = 2.3 / np.sqrt(2)
  np.testing.assert_allclose(velocity[0], [[-diagonal, -diagonal], [0, 1.3]])
  np.testing.assert_allclose(velocity[1, 0], [0.55, 0])
  assert np.isnan(velocity[1, 1]).all()


def test_nominal_speeds_are_the_mean_of_real_ones():
  speeds = {word: [] for word in _motion.NOMINAL_SPEED}
  for clip in _clips():
    for k, clause in enumerate(data.read_caption(clip.caption)):
      speeds[clause.speed].append(np.linalg.norm(clip.labels.velocities[0, k]))
  for word, nominal in _motion.NOMINAL_SPEED.items():
    assert np.mean(speeds[word]) == pytest.approx(nominal, abs=0.06)


def test_tracks_follow_the_labelled_positions():
  count = _captioned()[0].sum(axis=1)
  true = np.stack([clip.labels.positions for clip in _clips()])
  weights = _motion.ink(_video())
  one = _motion.track(weights[count == 1], 1)
  moved = np.diff(one - true[count == 1, :, :1], axis=1)
  assert np.abs(moved).mean() < 0.05  # pixels per frame
  two, true = _motion.track(weights[count == 2], 2), true[count == 2]
  distance = [
    np.linalg.norm(two[:, :, order] - true, axis=-1).mean(axis=(1, 2))
    for order in ([0, 1], [1, 0])
  ]
  assert np.median(np.min(distance, axis=0)) < 2.0  # pixels


def test_real_clips_score_far_below_wrong_ones():
  video, captioned = _video(), _captioned()[1]
  real = _error(video, captioned)
  assert (real < [0.25, 0.75]).all()
  frozen = np.repeat(video[:, :1], FRAMES, axis=1)
  opposite = _error(video, -captioned)
  assert (_error(frozen, captioned) > 1.8 * real).all()
  assert (_error(video[:, ::-1], captioned) > 1.3 * real).all()
  assert (opposite > 1.5 * real).all()


def test_a_frozen_digit_scores_the_captioned_speed():
  captioned = _captioned()[1]
  frozen = np.repeat(_video()[:, :1], FRAMES, axis=1)
  error = evaluation.motion_error(frozen, captioned)
  speed = np.nanmean(np.linalg.norm(captioned, axis=-1), axis=1)
  np.testing.assert_allclose(error, speed, atol=0.1)


def test_an_empty_canvas_and_an_empty_caption_do_no_harm():
  video = np.full((2, FRAMES, 32, 32), -1.0, np.float32)
  _, captioned = evaluation.captioned_motion(["two moving up", ""])
  error = evaluation.motion_error(video, captioned)
  assert error[0] == pytest.approx(1.3)
  assert np.isnan(error[1])


def test_clips_that_are_not_finite_still_get_a_number():
  video = np.full((1, FRAMES, 32, 32), np.nan, np.float32)
  _, captioned = evaluation.captioned_motion(["two moving up; one moving up"])
  assert np.isfinite(evaluation.motion_error(video, captioned)).all()
