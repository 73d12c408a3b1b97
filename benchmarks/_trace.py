"""Reads a profiler's trace: which kernels ran, and what collectives cost.

Collectives run beside other kernels. Their time is given twice: in all, and
*exposed*, while nothing else ran on the device, which is what they cost.
"""

import collections
import pathlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

_COLLECTIVE = re.compile(
  r"nccl|all-?gather|all-?reduce|all-?to-?all|reduce-?scatter"
  r"|collective-?permute|ragged-all",
  re.IGNORECASE,
)
_COPY = re.compile(r"memcpy|memset", re.IGNORECASE)


class Event(NamedTuple):
  """Something that a device did, from `start` to `stop` in nanoseconds."""

  device: str
  name: str
  start: float
  stop: float


class Kernel(NamedTuple):
  """All runs of a kernel on one device."""

  name: str
  calls: int
  ms: float


class Collectives(NamedTuple):
  """Shares of the time that the device was at work in.

  Attributes:
    share: while a collective ran.
    exposed: while nothing but a collective ran.
  """

  share: float
  exposed: float


def read(folder: str) -> list[Event]:
  """Returns what ran on the devices, from the newest trace in a folder.

  On GPUs these are the kernels of all streams; on CPUs, where devices are
  threads of the host, the operations of XLA's executor.
  """
  (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
  data: Any = jax.profiler.ProfileData.from_file(str(path))
  planes = [p for p in data.planes if p.name.startswith("/device:")]
  if any(_events(plane, "Stream") for plane in planes):
    return [e for plane in planes for e in _events(plane, "Stream")]
  hosts = [p for p in data.planes if p.name.startswith("/host:CPU")]
  return [e for plane in hosts for e in _events(plane, "tf_XLA")]


def _events(plane: Any, line_prefix: str) -> list[Event]:
  return [
    Event(plane.name, e.name, e.start_ns, e.start_ns + e.duration_ns)
    for line in plane.lines
    if line.name.startswith(line_prefix)
    for e in line.events
  ]


def longest(events: Iterable[Event], number: int) -> list[Kernel]:
  """Returns the kernels that took the most time on the first device."""
  events = _of_one_device(events)
  calls, spent = collections.Counter(), collections.defaultdict(float)
  for event in events:
    calls[event.name] += 1
    spent[event.name] += (event.stop - event.start) / 1e6
  return [
    Kernel(name, calls[name], round(ms, 3))
    for name, ms in sorted(spent.items(), key=lambda item: -item[1])[:number]
  ]


def collectives(events: Iterable[Event]) -> Collectives | None:
  """Returns what collectives cost on the first device; None without events."""
  events = _of_one_device(events)
  spans = lambda wanted: [(e.start, e.stop) for e in events if wanted(e)]
  is_collective = lambda e: bool(_COLLECTIVE.search(e.name))
  busy = length(spans(lambda e: True))
  if not busy:
    return None
  others = length(
    spans(lambda e: not is_collective(e) and not _COPY.search(e.name))
  )
  together = length(spans(lambda e: not _COPY.search(e.name)))
  return Collectives(
    share=length(spans(is_collective)) / busy,
    exposed=(together - others) / busy,
  )


def _of_one_device(events: Iterable[Event]) -> list[Event]:
  events = list(events)
  first = min((e.device for e in events), default="")
  return [e for e in events if e.device == first]


def length(spans: Iterable[tuple[float, float]]) -> float:
  """Returns the length of a union of intervals.

  Example:
    >>> length([(0, 2), (1, 3), (5, 6)])
    4.0
  """
  total, end = 0.0, float("-inf")
  for start, stop in sorted(spans):
    total += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return total
