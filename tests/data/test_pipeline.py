import json

import numpy as np
import pytest

from crcm_jax import data


def batches(builder, **settings):
  usual = dict(split="train", batch_size=4, frames=9)
  return data.moving_digits_batches(builder, **(usual | settings))


def take(iterator, count):
  return [next(iterator).x_0 for _ in range(count)]


def keys(arrays):
  """Names clips, so that they can be counted."""
  return [clip.tobytes() for array in arrays for clip in array]


def test_a_batch_holds_latents_and_captions(builder):
  batch = next(batches(builder))
  assert batch.x_0.shape == (4, 9, 8, 8, 16)
  assert batch.condition.shape == batch.null_condition.shape == (4, 8, 32)
  assert {a.dtype for a in batch} == {np.dtype("float32")}
  null = data.encode_captions([data.NULL_CAPTION] * 4)
  np.testing.assert_array_equal(batch.null_condition, null)
  assert 0.5 < batch.x_0.std() < 1.5


def test_colours_are_more_channels(tmp_path):
  builder = data.prepare_moving_digits(
    tmp_path, channels=3, frames=2, train_clips=4, test_clips=1
  )
  assert builder.info.full_name.startswith("moving_digits/rgb.frames-2")
  assert next(batches(builder, frames=2)).x_0.shape == (4, 2, 8, 8, 48)


def test_an_epoch_reads_every_clip_once_in_another_order(builder):
  iterator = batches(builder)
  first, second = keys(take(iterator, 11)), keys(take(iterator, 11))
  assert len(set(first)) == 44
  assert sorted(first) == sorted(second)
  assert first != second


def test_the_order_follows_from_the_seed(builder):
  a, b = keys(take(batches(builder), 5)), keys(take(batches(builder), 5))
  assert a == b
  assert a != keys(take(batches(builder, seed=1), 5))


def test_a_saved_position_resumes_exactly(builder):
  iterator = batches(builder)
  take(iterator, 9)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = take(iterator, 6)  # into the second epoch
  resumed = batches(builder)
  resumed.set_state(state)
  np.testing.assert_array_equal(take(resumed, 6), expected)


def test_batches_from_memory_are_the_same(builder):
  from_files = take(batches(builder, seed=3), 3)
  held = take(batches(builder, seed=3, in_memory=True), 3)
  np.testing.assert_array_equal(held, from_files)


@pytest.mark.parametrize("rows", [(0, 1), (2, 3), (1, 2), (0, 1, 2, 3)])
def test_a_process_reads_its_rows_of_the_same_batches(builder, rows):
  whole = take(batches(builder, batch_size=4), 13)  # into the second epoch
  share = take(batches(builder, batch_size=4, rows=rows), 13)
  for some, all_rows in zip(share, whole, strict=True):
    np.testing.assert_array_equal(some, all_rows[list(rows)])


def test_processes_have_equally_many_batches_when_clips_do_not_divide(builder):
  shares = [
    list(batches(builder, epochs=2, batch_size=6, rows=rows))
    for rows in ((0,), (1, 2), (3, 4, 5))
  ]
  assert [len(share) for share in shares] == [14, 14, 14]  # of 88 clips


def test_labels_belong_to_their_latents(builder):
  for batch, captions, labels in data.labelled_moving_digits(
    builder, split="test", batch_size=5, frames=7
  ):
    assert labels.positions.shape == labels.velocities.shape == (5, 7, 2, 2)
    np.testing.assert_array_equal(
      batch.condition, data.encode_captions(captions)
    )
    for caption, digits in zip(captions, labels.digits, strict=True):
      words = [clause.digit for clause in data.read_caption(caption)]
      assert words == [data.DIGIT_WORDS[d] for d in digits if d >= 0]
    video = data.video_from_latents(batch.x_0)
    at = np.round(labels.positions[:, :, 0] - 0.5).astype(int)
    near = [
      video[i, f, y - 2 : y + 3, x - 2 : x + 3].max()
      for i in range(5)
      for f, (x, y) in enumerate(at[i])
    ]
    assert min(near) > 0  # ink within two pixels of each centre


def test_evaluation_reads_the_split_once_in_a_fixed_order(builder):
  passes = [
    [x.captions for x in data.labelled_moving_digits(
      builder, batch_size=6, frames=2)]
    for _ in range(2)
  ]  # fmt: skip
  assert passes[0] == passes[1]
  assert len(passes[0]) == 3  # 20 clips; the last two fill no batch


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"batch_size": 0}, "`batch_size` must be at least 1.* got 0"),
    ({"rows": (3, 4)}, r"`rows` must lie in \[0, 4\).* got \[3, 4\]"),
    ({"rows": ()}, r"`rows` must .* at least one; got \[\]"),
    ({"frames": 13}, r"`frames` must lie in \[1, 12\].* got 13"),
    ({"frames": 0}, r"`frames` must lie in \[1, 12\].* got 0"),
    ({"batch_size": 45, "epochs": 1}, "at most the 44 clips .* got 45"),
  ],
)
def test_bad_settings_say_what_is_wrong(builder, setting, message):
  with pytest.raises(ValueError, match=message):
    batches(builder, **setting)


def test_an_unknown_split_is_an_error(builder, unchecked):
  with pytest.raises(ValueError, match=r"`split` must be one of .* got 'val'"):
    batches(builder, split="val")


def test_a_missing_extra_names_the_pip_command(monkeypatch, tmp_path):
  monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
  with pytest.raises(ImportError, match=r"pip install 'crcm_jax\[data\]'"):
    data.prepare_moving_digits(tmp_path)
