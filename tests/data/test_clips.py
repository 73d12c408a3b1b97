import hashlib

import numpy as np
import pytest

from crcm_jax import data

MARGIN = data.DIGIT_SIZE / 2


@pytest.fixture(scope="module")
def clips():
  return [data.make_clip(i) for i in range(40)]


def fingerprint(clip):
  parts = [clip.video.tobytes(), clip.caption.encode()]
  return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def test_a_clip_follows_from_seed_split_and_index():
  same = [data.make_clip(3, seed=1, split="test") for _ in range(2)]
  assert fingerprint(same[0]) == fingerprint(same[1])
  others = [
    data.make_clip(3, seed=2, split="test"),
    data.make_clip(3, seed=1, split="train"),
    data.make_clip(4, seed=1, split="test"),
  ]
  assert len({fingerprint(clip) for clip in [same[0], *others]}) == 4


def test_clips_stay_what_they_were_when_the_shipped_weights_were_trained():
  # Recorded from this code; a change means a new version of the dataset.
  assert fingerprint(data.make_clip(0)) == "5221309982a83cd2"


def test_a_longer_clip_begins_with_the_shorter():
  short, long = data.make_clip(5, frames=9), data.make_clip(5, frames=40)
  np.testing.assert_array_equal(long.video[:9], short.video)
  np.testing.assert_array_equal(long.labels.velocities[:9], short.labels[3])


def test_splits_share_no_scan():
  train, test = (data.scan_pool(split) for split in ("train", "test"))
  assert not set(np.concatenate(train)) & set(np.concatenate(test))
  assert sum(map(len, (*train, *test))) == 1797
  assert min(map(len, test)) >= 30
  for split, pool in (("train", train), ("test", test)):
    for index in range(20):
      digits, scans, *_ = data.make_clip(index, split=split).labels
      for digit, scan in zip(digits, scans, strict=True):
        assert digit == scan == -1 or scan in pool[digit]


def test_no_two_scans_are_equal():
  datasets = pytest.importorskip("sklearn.datasets")
  scans = datasets.load_digits().data
  assert len(np.unique(scans, axis=0)) == len(scans)


def test_labels_have_the_documented_shapes_and_absent_digits(clips):
  one = next(clip for clip in clips if clip.labels.digits[1] < 0)
  digits, scans, positions, velocities = one.labels
  assert (digits.shape, positions.shape) == ((2,), (21, 2, 2))
  assert digits.dtype == scans.dtype == np.int32
  assert positions.dtype == velocities.dtype == np.float32
  assert scans[1] == -1
  assert not positions[:, 1].any()
  assert not velocities[:, 1].any()


def test_digits_stay_on_the_canvas_and_bounce():
  start, velocity = np.array([[8.0, 20.0]]), np.array([[-2.0, 1.3]])
  positions, velocities = data.bounce(start, velocity, 50)
  assert positions.min() >= MARGIN
  assert positions.max() <= data.CANVAS - MARGIN
  np.testing.assert_array_equal(
    np.abs(velocities), np.broadcast_to(np.abs(velocity), velocities.shape)
  )
  # 8 -> 7 | 7 -> 8 -> 10: the first step ends where it began, reversed.
  np.testing.assert_allclose(positions[:4, 0, 0], [8, 8, 10, 12])
  np.testing.assert_array_equal(velocities[:3, 0, 0], [-2, 2, 2])
  # Between bounces a step is the velocity.
  free = velocities[1:] == velocities[:-1]
  steps = np.diff(positions, axis=0)
  np.testing.assert_allclose(steps[free], velocities[1:][free], atol=1e-12)
  assert (~free).sum() >= 6


def test_captions_tell_how_the_labels_start(clips):
  for clip in clips:
    clauses = data.read_caption(clip.caption)
    digits, _, _, velocities = clip.labels
    digits = digits[digits >= 0]
    starts = velocities[0, : len(digits)]
    for clause, digit, (x, y) in zip(clauses, digits, starts, strict=True):
      assert clause.digit == data.DIGIT_WORDS[digit]
      assert clause.horizontal == ("left", "", "right")[int(np.sign(x)) + 1]
      assert clause.vertical == ("up", "", "down")[int(np.sign(y)) + 1]
      speed = np.hypot(x, y)
      slowest, fastest = data.SPEEDS[clause.speed]
      assert slowest <= speed <= fastest


def test_the_captioned_motion_lasts_three_steps(clips):
  for clip in clips:
    velocities = clip.labels.velocities
    np.testing.assert_array_equal(
      velocities[:3], np.broadcast_to(velocities[0], (3, 2, 2))
    )


def test_two_digits_differ_and_start_apart(clips):
  pairs = [clip.labels for clip in clips if clip.labels.digits[1] >= 0]
  assert 10 <= len(pairs) <= 30
  for labels in pairs:
    assert labels.digits[0] != labels.digits[1]
    first, second = labels.positions[0]
    assert np.hypot(*(first - second)) >= 10


def test_ink_lies_where_the_labels_say(clips):
  for clip in clips:
    if clip.labels.digits[1] >= 0:
      continue
    ink = clip.video[..., 0].astype(float)
    pixel = np.arange(data.CANVAS) + 0.5
    x = (ink.sum(axis=1) * pixel).sum(-1) / ink.sum((1, 2))
    y = (ink.sum(axis=2) * pixel).sum(-1) / ink.sum((1, 2))
    offset = np.stack([x, y], -1) - clip.labels.positions[:, 0]
    # A scan's ink is not quite centred, but its offset moves along with it.
    assert np.abs(offset).max() < 3
    assert np.ptp(offset, axis=0).max() < 0.3


def test_nothing_is_cut_off_at_the_edges():
  scan, colours = np.ones((1, 8, 8)), np.ones((1, 1))
  corner, middle = (np.full((1, 1, 2), at) for at in (MARGIN, 16.0))
  at_edge = data.render_clip(scan, corner, colours)[0, :14, :14, 0]
  inside = data.render_clip(scan, middle, colours)[0, 9:23, 9:23, 0]
  np.testing.assert_array_equal(at_edge, inside)
  assert inside.min() > 40


def test_digits_cross_without_hiding_each_other():
  scans = np.zeros((2, 8, 8))
  scans[0, :, 3:5] = scans[1, 3:5] = 1
  video = data.render_clip(scans, np.full((1, 2, 2), 16.0), np.ones((2, 1)))
  alone = [
    data.render_clip(scans[[k]], np.full((1, 1, 2), 16.0), np.ones((1, 1)))
    for k in range(2)
  ]
  np.testing.assert_array_equal(video, np.maximum(*alone))


def test_rgb_colours_the_same_clip():
  grey, rgb = data.make_clip(0), data.make_clip(0, channels=3)
  assert rgb.video.shape == (21, 32, 32, 3)
  assert rgb.caption == grey.caption
  np.testing.assert_array_equal(rgb.labels.positions, grey.labels.positions)
  # Every colour has one full channel, so the brightest channel is the ink.
  np.testing.assert_array_equal(rgb.video.max(-1), grey.video[..., 0])
  assert np.ptp(rgb.video.astype(int), axis=-1).max() > 30
