"""How fast a run is, and what its time is lost to.

Numbers of the wall clock differ from run to run, and so do not belong among a
run's metrics, which a resumed run repeats exactly: they have a file of their
own. Each line covers the time since the line before it:

    tokens/s = steps * tokens a batch / seconds
    model FLOP utilisation = necessary FLOPs / seconds / peak of all devices

Time is lost to data while the devices have nothing to do and wait for a batch,
to checkpoints while the state is copied away from them, and to samples.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import jax

from crcm_jax.training._stages import Phase

Loss: TypeAlias = Literal["data", "checkpoints", "samples"]
"""What time is lost to."""

PEAK_FLOPS = {
  "H100 PCIe": 756e12,
  "H100": 989e12,
  "H200": 989e12,
  "B200": 2250e12,
  "A100": 312e12,
  "TPU v6": 918e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v4": 275e12,
}
"""Peak FLOP/s of dense bfloat16 products by a part of the device's kind; the
first that fits holds."""

_GIB = 2**30


def peak_flops(device_kind: str) -> float | None:
  """Returns the peak of one device, None if it is not known.

  Args:
    device_kind: `jax.devices()[0].device_kind`.

  Example:
    >>> peak_flops("NVIDIA H100 80GB HBM3")
    989000000000000.0
  """
  fitting = (peak for part, peak in PEAK_FLOPS.items() if part in device_kind)
  return next(fitting, None)


class Meter:
  """Counts a run's steps and its lost time."""

  def __init__(
    self,
    *,
    examples: int,
    tokens: int,
    flops: Callable[[Phase], float],
    devices: int = 1,
    peak: float | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Starts the clock.

    Args:
      examples: in a batch of all processes.
      tokens: likewise.
      flops: the necessary operations of a step of a phase; asked once for each
        phase, and not where the peak is unknown.
      devices: that share the work.
      peak: FLOP/s of one device; None if it is not known.
      clock: returns seconds.
    """
    self._examples, self._tokens = examples, tokens
    self._flops, self._peak = functools.cache(flops), peak
    self._devices, self._clock = devices, clock
    self._notes: dict[str, float] = {}
    self._running: Any = None
    self._start = clock()
    self._total = _Span(self._start)
    self._span = _Span(self._start)

  def started(self, metrics: Any) -> None:
    """A step was handed to the devices, and `metrics` will come of it."""
    self._running = metrics

  def finished(self, phase: Phase) -> None:
    """A step's metrics have come."""
    for span in (self._span, self._total):
      span.steps += 1
      span.flops += self._flops(phase) if self._peak else 0.0

  def is_idle(self) -> bool:
    """Whether the devices have done all that they were given."""
    return all(a.is_ready() for a in jax.tree.leaves(self._running))

  def lose(self, to: Loss, seconds: float) -> None:
    """Counts time that was lost."""
    for span in (self._span, self._total):
      span.lost[to] += seconds

  @contextlib.contextmanager
  def losing(self, to: Loss) -> Iterator[None]:
    """Counts the time that something takes as lost."""
    start = self._clock()
    try:
      yield
    finally:
      self.lose(to, self._clock() - start)

  def note(self, name: str, value: float | int) -> None:
    """Keeps a number to be written with the others."""
    self._notes[name] = float(value)

  def read(self) -> dict[str, float]:
    """Returns the numbers of the time since they were last read."""
    span, now = self._span, self._clock()
    self._span = _Span(now)
    memory = device_memory(jax.local_devices())
    return self._rates(span, now) | self._notes | memory

  def summary(self) -> str:
    """Says how the whole run went."""
    now = self._clock()
    rates, seconds = self._rates(self._total, now), now - self._start
    lost = (f"{s:.1f} s to {to}" for to, s in self._total.lost.items())
    return (
      f"{self._total.steps} steps in {seconds:.1f} s,"
      f" {rates['tokens_per_second']:.4g} tokens/s; lost {', '.join(lost)}"
    )

  def _rates(self, span: "_Span", now: float) -> dict[str, float]:
    seconds = max(now - span.start, 1e-9)
    pace = span.steps / seconds
    rates = {
      "steps_per_second": pace,
      "examples_per_second": pace * self._examples,
      "tokens_per_second": pace * self._tokens,
      **{f"{to}_seconds": lost for to, lost in span.lost.items()},
    }
    if self._peak:
      utilisation = span.flops / seconds / (self._peak * self._devices)
      rates["model_flop_utilisation"] = utilisation
    return rates


class _Span:
  """What was done since a time."""

  def __init__(self, start: float):
    self.start = start
    self.steps = 0
    self.flops = 0.0
    self.lost: dict[Loss, float] = dict.fromkeys(
      ("data", "checkpoints", "samples"), 0.0
    )


def device_memory(devices: Any) -> dict[str, float]:
  """Returns GiB in use and at most in use, of the fullest device.

  Args:
    devices: of this process. A CPU does not tell.
  """
  every: list[Mapping[str, int]] = [d.memory_stats() or {} for d in devices]
  names = {
    "device_memory_gib": "bytes_in_use",
    "device_memory_peak_gib": "peak_bytes_in_use",
  }
  return {
    name: max(stats[key] for stats in every) / _GIB
    for name, key in names.items()
    if all(key in stats for stats in every)
  }


def tokens_of(shape: tuple[int, ...], patch: tuple[int, int, int]) -> int:
  """Returns the tokens of latents `[b, f, h, w, c]`.

  Args:
    shape: of the latents.
    patch: latent frames, rows and columns of one token.
  """
  return math.prod(shape[:4]) // math.prod(patch)
