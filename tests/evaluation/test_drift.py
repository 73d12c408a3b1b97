"""Statistics of chunks against closed forms."""

import numpy as np
import pytest

from crcm_jax.evaluation import chunk_statistics

SPANS = ((0, 1), (1, 4), (4, 7))


def clips(gains, offsets):
  """The same noise in each frame, its chunks scaled and shifted."""
  noise = np.random.default_rng(0).normal(size=(2, 1, 6, 5, 3)) / 8
  noise -= noise.mean(axis=(1, 2, 3), keepdims=True)
  chunk = np.repeat(np.arange(3), [1, 3, 3])
  gain, offset = (np.array(a, float)[chunk] for a in (gains, offsets))
  wide = lambda a: a.reshape(1, -1, 1, 1, 1)
  return wide(gain) * noise + wide(offset)


def test_mean_and_drift_of_a_changing_brightness():
  measured = chunk_statistics(clips([1, 1, 1], [0.1, 0.2, -0.3]), SPANS)
  np.testing.assert_allclose(measured.mean, [[0.1, 0.2, -0.3]] * 2, atol=1e-12)
  np.testing.assert_allclose(measured.drift, [[0, 0.1, 0.4]] * 2, atol=1e-12)
  np.testing.assert_allclose(np.ptp(measured.std, axis=1), 0, atol=1e-12)


def test_std_and_drift_of_a_growing_contrast():
  video = clips([1, 2, 3], [0, 0, 0])
  measured = chunk_statistics(video, SPANS)
  first = measured.std[:, :1]
  np.testing.assert_allclose(measured.std, first * [1, 2, 3], rtol=1e-12)
  channels = video[:, 0].std(axis=(1, 2))  # [b c]
  root = np.sqrt((channels**2).mean(axis=1))[:, None]
  np.testing.assert_allclose(measured.drift, root * [0, 1, 2], atol=1e-12)


def test_drift_is_the_distance_of_normal_distributions():
  measured = chunk_statistics(clips([1, 2, 1], [0, 0.3, 0]), SPANS)
  contrast = chunk_statistics(clips([1, 2, 1], [0, 0, 0]), SPANS)
  np.testing.assert_allclose(
    measured.drift[:, 1], np.hypot(contrast.drift[:, 1], 0.3), rtol=1e-12
  )


def test_colours_that_move_apart_are_drift_of_the_same_brightness():
  video = np.zeros((1, 2, 4, 4, 2))
  video[:, 1, ..., 0], video[:, 1, ..., 1] = 0.5, -0.5
  measured = chunk_statistics(video, [(0, 1), (1, 2)])
  np.testing.assert_allclose(measured.mean, 0)
  np.testing.assert_allclose(measured.drift, [[0, 0.5]])


def test_saturated_pixels_are_those_at_either_end_or_beyond():
  video = np.zeros((1, 2, 2, 2, 1))
  video[0, 1, ..., 0] = [[1.0, -1.2], [0.99, 254 / 255]]
  measured = chunk_statistics(video, [(0, 1), (1, 2)])
  np.testing.assert_allclose(measured.saturated, [[0, 0.75]])


@pytest.mark.parametrize("span", [(0, 0), (1, 3), (-1, 1)])
def test_spans_must_lie_within_the_video(span):
  with pytest.raises(ValueError, match=r"`spans` must lie within the 2 frames"):
    chunk_statistics(np.zeros((1, 2, 1, 1, 1)), [span])
