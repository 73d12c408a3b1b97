"""Bad records in prepared datasets, and worker processes that read them."""

import json
import logging
import multiprocessing
import os
import re
import signal

import numpy as np
import pytest

from crcm_jax import data

pytest.importorskip("tensorflow_datasets")
array_record = pytest.importorskip("array_record.python.array_record_module")

SHAPE, TEXT = (3, 4, 4, 4), (3, 6)
COUNT = 12
FILE = "wan_latents-train.array_record-00000-of-00001"


def example(i):
  rng = np.random.default_rng(i)
  return data.LatentExample(
    key=f"{i:02d}",
    latents=rng.normal(size=SHAPE).astype(np.float32),
    embedding=rng.normal(size=TEXT).astype(np.float32),
    caption="a cat",
  )


def prepare(path, records):
  null = np.zeros(TEXT, np.float32)
  return data.prepare_wan_latents(path, "tiny", records, null_embedding=null)


@pytest.fixture
def folder(tmp_path):
  """A dataset of twelve good records."""
  return prepare(tmp_path, map(example, range(COUNT)))


def raw_records(path):
  reader = array_record.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  return records


def rewrite(path, changes):
  """Writes a file again, some of its records changed."""
  records = raw_records(path)
  for index, change in changes.items():
    records[index] = change(records[index])
  writer = array_record.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def truncated(record):
  return record[: len(record) // 2]


def not_finite(record):
  """The latents' numbers become NaN, what is around them stays."""
  for i in range(COUNT):
    numbers = example(i).latents.astype(np.float16)
    nan = np.full_like(numbers, np.nan)
    record = record.replace(numbers.tobytes(), nan.tobytes())
  return record


@pytest.fixture(scope="module")
def short(tmp_path_factory):
  """Returns what puts a whole record of other latents in another's place."""
  folder = prepare(
    tmp_path_factory.mktemp("short"),
    [example(0)._replace(latents=example(0).latents[:2])],
  )
  (record,) = raw_records(folder / FILE)
  return lambda _: record


@pytest.fixture
def bad(short):
  return {1: truncated, 4: short, 5: not_finite}


def batches(folder, *, workers=0, max_bad=10, **settings):
  usual = dict(batch_size=4, shuffle=False, epochs=1)
  reading = data.Reading(workers=workers, max_bad=max_bad)
  return data.wan_latents_batches(folder, reading=reading, **usual | settings)


def videos(iterator):
  return np.concatenate([batch.x_0 for batch in iterator])


def test_bad_records_are_named_and_the_next_good_ones_take_their_place(
  folder, bad, caplog
):
  whole = videos(batches(folder))
  rewrite(folder / FILE, bad)
  iterator = batches(folder)
  with caplog.at_level(logging.WARNING, logger="crcm_jax"):
    read = videos(iterator)
  places = [0, 2, 2, 3, 6, 6, *range(6, COUNT)]
  np.testing.assert_array_equal(read, whole[places])
  reasons = iterator.bad_records
  assert list(reasons) == [f"{FILE}, record {i}" for i in bad]
  first, second, third = reasons.values()
  assert first.startswith("cannot be read: ")
  assert re.match(r"cannot be read: .*(reshape|shape)", second)
  assert third == "has `x_0` that is not finite"
  assert caplog.text.count("Skipped: ") == 3
  assert f"Skipped: {FILE}, record 5, has `x_0` that is not" in caplog.text


def test_a_bad_record_counts_once_however_often_it_is_met(folder):
  rewrite(folder / FILE, {3: truncated})
  iterator = batches(folder, epochs=3, shuffle=True, max_bad=1)
  assert len(videos(iterator)) == 3 * COUNT
  assert len(iterator.bad_records) == 1


def test_more_bad_records_than_allowed_are_an_error(folder):
  rewrite(folder / FILE, {0: truncated, 5: not_finite, 9: truncated})
  iterator = batches(folder, max_bad=1)
  next(iterator)
  message = (
    r"`max_bad` must allow for the bad records; it is 1, and there are at least"
    rf" 2: {FILE}, record 0, cannot .*; {FILE}, record 5, has .*Prepare"
  )
  with pytest.raises(ValueError, match=message):
    next(iterator)


def test_bad_records_are_remembered_with_the_position(folder):
  """Else a run that is stopped often would skip any number of them."""
  rewrite(folder / FILE, {0: truncated, 5: not_finite, 9: truncated})
  first, second = (batches(folder, max_bad=1) for _ in range(2))
  next(first)
  state = json.loads(json.dumps(first.get_state()))
  second.set_state(state)
  assert list(second.bad_records) == [f"{FILE}, record 0"]
  with pytest.raises(ValueError, match=r"are at least 2: .*record 0.*record 5"):
    next(second)
  second.set_state({"next_index": 0})  # of an older checkpoint
  assert not second.bad_records


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_named(folder, damage):
  path = folder / FILE
  raw = bytearray(path.read_bytes())
  if damage == "cut":
    raw = raw[: len(raw) // 2]
  else:
    for at in range(len(raw) // 4, len(raw), len(raw) // 4):
      raw[at] ^= 0xFF
  path.write_bytes(bytes(raw))
  with pytest.raises(ValueError, match=rf"{FILE}, record \d, cannot be read"):
    videos(batches(folder, max_bad=0))


def test_clips_of_digits_are_checked_too(tmp_path):
  builder = data.prepare_moving_digits(
    tmp_path, frames=3, train_clips=8, test_clips=1
  )
  (path,) = builder.data_path.glob("*train*array_record*")
  rewrite(path, {2: truncated})
  iterator = data.moving_digits_batches(
    builder, split="train", batch_size=4, frames=3, shuffle=False, epochs=1
  )
  clips = videos(iterator)
  assert list(iterator.bad_records) == [f"{path.name}, record 2"]
  np.testing.assert_array_equal(clips[2], clips[3])


def children():
  return {child.pid for child in multiprocessing.active_children()}


def test_two_worker_processes_read_the_same_batches(folder, bad, monkeypatch):
  """Two real processes, bad records and positions included."""
  rewrite(folder / FILE, bad)
  # Neither may start a JAX backend: it would take the accelerator's memory.
  monkeypatch.setenv("JAX_PLATFORMS", "none_at_all")
  settings = dict(epochs=2, shuffle=True, seed=3)
  alone = batches(folder, **settings)
  expected = [batch.x_0 for batch in alone]
  helped = batches(folder, workers=2, **settings)
  before = children()
  first = [next(helped).x_0 for _ in range(2)]
  started = children() - before
  assert len(started) == 2
  for pid in started:
    os.kill(pid, signal.SIGINT)  # Ctrl-C reaches them too; they read on.
  state = json.loads(json.dumps(helped.get_state()))
  rest = [batch.x_0 for batch in helped]
  helped.close()
  np.testing.assert_array_equal([*first, *rest], expected)
  assert helped.bad_records == alone.bad_records
  # A position does not depend on the number of workers.
  resumed = batches(folder, **settings)
  resumed.set_state(state)
  np.testing.assert_array_equal([b.x_0 for b in resumed], rest)


def test_a_worker_hands_on_what_is_wrong(folder):
  rewrite(folder / FILE, dict.fromkeys(range(COUNT), truncated))
  iterator = batches(folder, workers=1, max_bad=2)
  with pytest.raises(ValueError, match=rf"at least 3: {FILE}, record 0"):
    next(iterator)
  iterator.close()


@pytest.mark.parametrize("name", ["workers", "max_bad"])
def test_settings_are_checked(name):
  with pytest.raises(ValueError, match=rf"`{name}` must not be negative"):
    data.Reading(**{name: -1})
