"""Batches on the devices: the next one is put there while a step runs.

A thread reads one batch ahead, no more. The position that belongs into a
checkpoint is that behind the batch handed out last, not behind the one that
waits: a resumed run reads it again.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from crcm_jax.training._speed import Meter

_LOG = logging.getLogger(__name__)

FIRST_NOTICE = 5.0
"""Seconds without data after which the log says so; again at twice as many."""

_PATIENCE = 5.0  # seconds in which a thread must end, or it is left alone
_POLL = 0.02  # seconds between two looks at whether the devices are idle


class Stopped(Exception):
  """There was no batch yet when the run was asked to stop."""


class Feed:
  """An iterator of placed batches with the position of the last one."""

  def __init__(
    self,
    batches: Any,
    place: Callable[[Any], Any],
    meter: Meter,
    show: Callable[[str], Any] = lambda text: None,
    stopping: Callable[[], bool] = lambda: False,
  ):
    """Takes over an iterator of batches; the thread starts with the first.

    Args:
      batches: a `data.BatchIterator` at its position; nobody else may use it.
      place: puts a batch on the devices.
      meter: counts the time in which idle devices wait for data.
      show: shows a note beside the progress bar.
      stopping: whether to raise `Stopped` where a batch is not there yet.
    """
    self._batches, self._place = batches, place
    self._meter, self._show, self._stopping = meter, show, stopping
    self._state = batches.get_state()
    self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Feed":
    return self

  def __exit__(self, *error: Any) -> None:
    self.close()

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> Any:
    if self._thread is None:
      # A daemon, because reading may hang when the process wants to end.
      self._thread = threading.Thread(target=self._read_ahead, daemon=True)
      self._thread.start()
      self._wanted.put(True)
    batch, state, error = self._wait()
    if error is not None:
      self._thread = None
      raise error
    self._wanted.put(True)
    self._state = state
    self._meter.note("bad_records", len(_bad_records(self._batches)))
    return batch

  def get_state(self) -> Any:
    """Returns the position behind the batch that was handed out last."""
    return self._state

  def close(self) -> None:
    """Ends the thread and, if it is not stuck, the iterator of batches."""
    self._wanted.put(False)
    if self._thread is not None:
      self._thread.join(timeout=_PATIENCE)
      if self._thread.is_alive():
        return
    if hasattr(self._batches, "close"):
      self._batches.close()

  def _read_ahead(self) -> None:
    while self._wanted.get():
      try:
        batch = next(self._batches)
        self._ready.put((self._place(batch), self._batches.get_state(), None))
      except BaseException as error:  # for the one who waits
        self._ready.put((None, None, error))
        return

  def _wait(self) -> Any:
    """Returns what the thread made; says so if that takes long."""
    start = before = time.monotonic()
    notice = FIRST_NOTICE
    while True:
      idle = self._meter.is_idle()
      try:
        return self._ready.get(timeout=_POLL)
      except queue.Empty:
        if self._stopping():
          raise Stopped from None
        waited = time.monotonic() - start
        if waited >= notice:
          notice = 2 * waited
          _LOG.warning("Waiting for data, for %.0f s so far.", waited)
        if waited >= 1:
          self._show(f"waiting for data, {waited:.0f} s")
      finally:
        now = time.monotonic()
        if idle:
          self._meter.lose("data", now - before)
        before = now


def _bad_records(batches: Any) -> Any:
  """Which records were skipped, if the iterator counts them."""
  return getattr(batches, "bad_records", ())
