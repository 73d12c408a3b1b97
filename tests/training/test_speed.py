"""Throughput, utilisation and lost time against a clock that is known."""

import jax.numpy as jnp
import pytest

from crcm_jax.training import _speed


class Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


@pytest.fixture
def clock():
  return Clock()


FLOPS = {"student": 6e12, "critic": 2e12}


def make(clock, **settings):
  usual = dict(examples=4, tokens=1000, flops=FLOPS.get, clock=clock)
  return _speed.Meter(**(usual | settings))


def test_rates_cover_the_time_since_the_last_line(clock):
  meter = make(clock)
  clock.now += 50
  meter.read()
  for phase in ("student", "critic", "critic"):
    meter.finished(phase)
  clock.now += 6
  line = meter.read()
  assert line["steps_per_second"] == 0.5
  assert line["examples_per_second"] == 2.0
  assert line["tokens_per_second"] == 500.0
  assert "model_flop_utilisation" not in line


def test_utilisation_is_of_all_devices_and_of_each_phases_operations(clock):
  meter = make(clock, peak=1e12, devices=4)
  for phase in ("student", "critic", "critic"):
    meter.finished(phase)
  clock.now += 5
  assert meter.read()["model_flop_utilisation"] == pytest.approx(10 / 5 / 4)


def test_operations_are_counted_once_a_phase(clock):
  asked = []
  meter = make(clock, peak=1e12, flops=lambda p: asked.append(p) or 1.0)
  for phase in ("student", "critic", "student", "critic"):
    meter.finished(phase)
  assert asked == ["student", "critic"]


def test_operations_are_not_counted_where_the_peak_is_unknown(clock):
  meter = make(clock, flops=lambda phase: pytest.fail("counted"))
  meter.finished("student")


def test_lost_time_is_told_by_what_it_was_lost_to(clock):
  meter = make(clock)
  with meter.losing("checkpoints"):
    clock.now += 3
  meter.lose("data", 2.0)
  meter.finished("student")
  clock.now += 2
  line = meter.read()
  assert line["checkpoints_seconds"] == 3
  assert line["data_seconds"] == 2
  assert line["samples_seconds"] == 0
  assert meter.read()["data_seconds"] == 0
  assert meter.summary() == (
    "1 steps in 5.0 s, 200 tokens/s; lost 2.0 s to data, 3.0 s to checkpoints,"
    " 0.0 s to samples"
  )


class Metric:
  def __init__(self, ready):
    self._ready = ready

  def is_ready(self):
    return self._ready


def test_devices_are_idle_when_their_last_metrics_are_there(clock):
  meter = make(clock)
  assert meter.is_idle()
  meter.started({"loss": Metric(ready=True), "norm": Metric(ready=False)})
  assert not meter.is_idle()
  meter.started({"loss": jnp.ones(()).block_until_ready()})
  assert meter.is_idle()


class Device:
  def __init__(self, **stats):
    self._stats = stats

  def memory_stats(self):
    return self._stats or None


def test_memory_is_that_of_the_fullest_device():
  devices = [
    Device(bytes_in_use=2**30, peak_bytes_in_use=3 * 2**30),
    Device(bytes_in_use=2**31, peak_bytes_in_use=2**31),
  ]
  assert _speed.device_memory(devices) == {
    "device_memory_gib": 2.0,
    "device_memory_peak_gib": 3.0,
  }
  assert _speed.device_memory([Device()]) == {}


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v5p", 459e12),
    ("TPU v6 lite", 918e12),
    ("cpu", None),
    ("NVIDIA GeForce GTX 970", None),
  ],
)
def test_the_peak_follows_from_the_kind_of_device(kind, peak):
  assert _speed.peak_flops(kind) == peak


def test_a_token_is_a_patch():
  assert _speed.tokens_of((2, 21, 60, 104, 16), (1, 2, 2)) == 2 * 21 * 1560
