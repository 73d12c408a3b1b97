"""Prefetch to the devices: positions, stalls, errors."""

import logging
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.training import _feed
from crcm_jax.training._speed import Meter


class Count:
  """Counts from its position; `gate` lets it go on."""

  def __init__(self, stop=100, delay=0.0):
    self.position, self.stop, self.delay = 0, stop, delay
    self.gate = threading.Event()
    self.gate.set()
    self.closed = False
    self.bad_records = {}

  def __next__(self):
    self.gate.wait()
    time.sleep(self.delay)
    if self.position == self.stop:
      raise StopIteration
    if self.position == 3:
      self.bad_records["file, record 3"] = "is cut off"
    self.position += 1
    return np.array(self.position - 1)

  def get_state(self):
    return {"position": self.position}

  def set_state(self, state):
    self.position = state["position"]

  def close(self):
    self.closed = True


def meter():
  return Meter(examples=1, tokens=1, flops=lambda phase: 0.0)


def until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_one_batch_is_read_and_placed_ahead_and_no_more():
  batches, placed = Count(), []
  with _feed.Feed(batches, lambda x: placed.append(x) or x, meter()) as feed:
    assert next(feed) == 0
    until(lambda: len(placed) == 2)
    time.sleep(0.05)
    assert [int(x) for x in placed] == [0, 1]
  assert batches.closed


def test_the_position_is_that_of_the_last_batch_used():
  batches = Count()
  with _feed.Feed(batches, jax.device_put, meter()) as feed:
    assert feed.get_state() == {"position": 0}
    assert [int(next(feed)) for _ in range(3)] == [0, 1, 2]
    until(lambda: batches.position == 4)
    state = feed.get_state()
  assert state == {"position": 3}
  resumed = Count()
  resumed.set_state(state)
  with _feed.Feed(resumed, jax.device_put, meter()) as feed:
    assert next(feed) == 3


def test_a_stall_is_said_and_counted(caplog, monkeypatch):
  monkeypatch.setattr(_feed, "FIRST_NOTICE", 0.1)
  batches, watch, shown = Count(), meter(), []
  with _feed.Feed(batches, jax.device_put, watch, shown.append) as feed:
    next(feed)
    until(lambda: batches.position == 2)
    batches.gate.clear()
    next(feed)  # was read ahead
    watch.read()
    threading.Timer(1.3, batches.gate.set).start()
    with caplog.at_level(logging.WARNING, logger="crcm_jax"):
      assert next(feed) == 2
    assert 1.1 < watch.read()["data_seconds"] < 5
  said = [record.message for record in caplog.records]
  assert said[0] == "Waiting for data, for 0 s so far."
  assert 2 <= len(said) <= 4  # after 0.1, 0.2, 0.4, 0.8 seconds
  assert shown[-1] == "waiting for data, 1 s"


def test_time_in_which_the_devices_are_busy_is_not_lost():
  watch = meter()
  with _feed.Feed(Count(delay=0.3), jax.device_put, watch) as feed:
    watch.started({"loss": _Running()})
    next(feed)
    assert watch.read()["data_seconds"] == 0
    watch.started({"loss": jnp.ones(())})
    next(feed)
    assert watch.read()["data_seconds"] > 0.1


class _Running:
  """A metric that does not come."""

  def is_ready(self):
    return False


def test_an_error_of_the_data_is_raised_by_the_loops_thread():
  with _feed.Feed(Count(stop=2), jax.device_put, meter()) as feed:
    assert [int(next(feed)) for _ in range(2)] == [0, 1]
    with pytest.raises(StopIteration):
      next(feed)


def test_bad_records_are_counted():
  watch = meter()
  with _feed.Feed(Count(), jax.device_put, watch) as feed:
    for _ in range(5):
      next(feed)
    assert watch.read()["bad_records"] == 1
