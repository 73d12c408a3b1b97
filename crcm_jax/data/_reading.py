"""From the records of a prepared dataset to batches, in one process or many.

A record that cannot be used (cut off, of another shape, not finite) is named,
and the next good one of the split takes its place, so that the number of
records, and with it every position, stays what it was. The names travel with
the examples, from worker processes too, to the one place that counts them.

A position is one number, the batches read so far: it does not depend on how
many worker processes read them.
"""

import bisect
import dataclasses
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from crcm_jax._extras import require
from crcm_jax.data._batch import Batch
from crcm_jax.data._records import BadRecord

_LOG = logging.getLogger("crcm_jax")

_AHEAD = 2  # batches that each reader holds ready


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
  """How a prepared dataset is read; which batches it gives is the same.

  Attributes:
    workers: processes that read and decode beside the main one; 0 for a
      thread of it.
    max_bad: bad records to skip; one more is an error that names them all.

  Raises:
    ValueError: if one is negative.
  """

  workers: int = 0
  max_bad: int = 10

  def __post_init__(self):
    for name in ("workers", "max_bad"):
      if getattr(self, name) < 0:
        raise ValueError(
          f"`{name}` must not be negative; got {getattr(self, name)}."
        )


class Read(NamedTuple):
  """An example or a batch, and the bad records met on the way to it."""

  batch: Batch
  bad: tuple[BadRecord, ...] = ()


class Records:
  """The records of a prepared split, opened by each process that reads them.

  TFDS' own builders and data sources do not pickle, and so cannot go to worker
  processes.
  """

  def __init__(self, folder: str | os.PathLike[str], split: str):
    """Names a split of the dataset in `folder`."""
    self._folder, self._split = os.fspath(folder), split
    files = self._builder().info.splits[split].file_instructions
    self._files = [os.path.basename(file.filename) for file in files]
    self._ends = list(itertools.accumulate(file.take for file in files))
    self._opened: Any = None
    self._lock = threading.Lock()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> dict[str, Any]:
    with self._lock:
      if self._opened is None:
        self._opened = self._builder().as_data_source(self._split)
    return self._opened[index]

  def name(self, index: int) -> str:
    """Says which record of which file it is, both from 0."""
    file = bisect.bisect_right(self._ends, index)
    before = self._ends[file - 1] if file else 0
    return f"{self._files[file]}, record {index - before}"

  def _builder(self) -> Any:
    tfds = require("tensorflow_datasets", extra="data")
    return tfds.builder_from_directory(self._folder)

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_opened": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())


class Examples:
  """A source of examples for Grain: record by record, the bad ones replaced."""

  def __init__(
    self,
    records: Records,
    make: Callable[[dict[str, Any]], Batch],
    shapes: Sequence[tuple[int, ...]],
    max_bad: int,
  ):
    """Reads examples of records.

    Args:
      records: where from.
      make: an example of a record; raises if it cannot. Must pickle.
      shapes: of the arrays of a good example.
      max_bad: bad records in a row to skip.
    """
    self._records, self._make = records, make
    self._shapes, self._max_bad = tuple(map(tuple, shapes)), max_bad

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Read:
    bad: list[BadRecord] = []
    while True:
      at = (index + len(bad)) % len(self)
      example, problem = self._try(at)
      if problem is None:
        return Read(example, tuple(bad))
      bad.append(BadRecord(self._records.name(at), problem))
      if len(bad) > self._max_bad or len(bad) == len(self):
        raise too_many(bad, self._max_bad)

  def _try(self, index: int) -> tuple[Any, str | None]:
    """Returns an example, or what is wrong with its record."""
    try:
      example = self._make(self._records[index])
    except Exception as error:  # a broken file can raise anything
      reason = str(error).strip().split("\n")[0][:200]
      return None, f"cannot be read: {reason or type(error).__name__}"
    return example, _problem(example, self._shapes)


def _problem(example: Batch, shapes: Sequence[tuple[int, ...]]) -> str | None:
  for name, array, shape in zip(Batch._fields, example, shapes, strict=True):
    if array.shape != shape:
      return f"must have `{name}` of shape {shape}; it has {array.shape}"
    if not np.isfinite(array).all():
      return f"has `{name}` that is not finite"
  return None


def too_many(bad: Sequence[BadRecord], max_bad: int) -> ValueError:
  """Returns the error that names the bad records."""
  return ValueError(
    f"`max_bad` must allow for the bad records; it is {max_bad}, and there are"
    f" at least {len(bad)}: "
    + "; ".join(f"{record.key}, {record.reason}" for record in bad)
    + ". Prepare the dataset again, or raise it (in a config it is"
    " `loop.max_bad_records`) if good ones are left."
  )


def stack(reads: Sequence[Read]) -> Read:
  """Makes a batch of examples."""
  arrays: Any = map(np.stack, zip(*(r.batch for r in reads), strict=True))
  bad = itertools.chain.from_iterable(read.bad for read in reads)
  return Read(Batch(*arrays), tuple(bad))


def read_ahead(dataset: Any) -> Any:
  """Returns Grain's `IterDataset` of a `MapDataset`, one thread ahead."""
  grain = require("grain", extra="data")
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_AHEAD)
  return dataset.to_iter_dataset(options)


class Batches:
  """An iterator of batches that counts bad records; see `BatchIterator`.

  Attributes:
    bad_records: names of the records skipped so far, and why.
  """

  def __init__(self, reads: Any, reading: Reading):
    """Reads batches.

    Args:
      reads: Grain's `MapDataset` of `Read`s of batches.
      reading: how.
    """
    self._reads, self._reading = reads, reading
    self._position = 0
    self._iterator: Any = None
    self.bad_records: dict[str, str] = {}

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    if self._iterator is None:
      self._iterator = self._start()
    read = next(self._iterator)
    self._position += 1
    self._count(read.bad)
    return read.batch

  def get_state(self) -> dict[str, Any]:
    """Returns position and bad records, in a form that JSON can hold."""
    return {
      "next_index": self._position,
      "bad_records": dict(self.bad_records),
    }

  def set_state(self, state: dict[str, Any], /) -> None:
    """Moves to a position that `get_state` returned, with its bad records."""
    self.close()
    self._position = state["next_index"]
    self.bad_records = dict(state.get("bad_records", {}))

  def close(self) -> None:
    """Ends the reading threads and processes."""
    if self._iterator is not None:
      self._iterator.close()
      self._iterator = None

  def _start(self) -> Any:
    """Reads on from the position, one thread or several processes ahead."""
    ahead = read_ahead(self._reads[self._position :])
    if self._reading.workers:
      grain = require("grain", extra="data")
      _parse_flags()
      options = grain.MultiprocessingOptions(
        num_workers=self._reading.workers, per_worker_buffer_size=_AHEAD
      )
      ahead = ahead.mp_prefetch(options, _prepare_worker)
    return iter(ahead)

  def _count(self, bad: Sequence[BadRecord]) -> None:
    for record in bad:
      if record.key not in self.bad_records:
        self.bad_records[record.key] = record.reason
        _LOG.warning("Skipped: %s, %s.", record.key, record.reason)
    if len(self.bad_records) > self._reading.max_bad:
      every = [BadRecord(*item) for item in self.bad_records.items()]
      raise too_many(every, self._reading.max_bad)


def _prepare_worker(index: int, count: int) -> None:
  """Leaves signals to the process that trains, and ends when it does.

  Schedulers signal a whole group of processes. The one that trains saves before
  it ends, for which it may need another batch.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """Ends this process with the one that trains, even if that one was killed."""
  if (parent := multiprocessing.parent_process()) is not None:
    parent.join()
    os._exit(1)


def _parse_flags() -> None:
  """Lets Grain read its absl flags, which it needs to start processes."""
  from absl import flags  # comes with Grain

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
