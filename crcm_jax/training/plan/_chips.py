"""What is known of accelerators, and how many of them a topology has."""

import math
import re
from typing import NamedTuple

GIB = 2.0**30


class Chip(NamedTuple):
  """One device, as its maker describes it.

  Attributes:
    platform: "tpu", "gpu" or "cpu".
    peak: bfloat16 operations a second in dense matrix products.
    memory: bytes that a program may use.
    bandwidth: bytes a second from and to that memory.
    interconnect: bytes a second out to the other devices, all links together.
    axes: numbers in a topology's shape.
  """

  platform: str
  peak: float
  memory: float
  bandwidth: float
  interconnect: float
  axes: int


# TPUs: docs.cloud.google.com/tpu/docs/v5e, v5p and v6e: peak bf16, HBM
# bandwidth, and inter-chip interconnect: 400, 1,200 and 800 GB/s a chip in both
# directions, of which half goes out. Their memory is what libtpu's compiler
# says is available, of 16, 95 and 32 GB.
# GPUs: NVIDIA's data sheets of the A100, H100 and H200 (SXM, without sparsity):
# NVLink of 600 and 900 GB/s, half of it out; memory as nvidia-smi shows it.
# A "cpu" is one of the fake devices that one process makes, with round numbers.
CHIPS = {
  "v5e": Chip("tpu", 197e12, 15.75 * GIB, 819e9, 200e9, 2),
  "v5p": Chip("tpu", 459e12, 95.73 * GIB, 2765e9, 600e9, 3),
  "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1600e9, 400e9, 2),
  "a100": Chip("gpu", 312e12, 79.2 * GIB, 2039e9, 300e9, 1),
  "h100": Chip("gpu", 989e12, 79.6 * GIB, 3350e9, 450e9, 1),
  "h200": Chip("gpu", 989e12, 140.4 * GIB, 4800e9, 450e9, 1),
  "cpu": Chip("cpu", 1e11, 4 * GIB, 1e10, 1e10, 1),
}
"""Chips by the names that topologies give them."""


class Topology(NamedTuple):
  """Some chips of one kind.

  Attributes:
    name: such as "v5e:16x16".
    chip: what each of them is.
    devices: how many there are.
  """

  name: str
  chip: Chip
  devices: int


def parse_topology(text: str) -> Topology:
  """Reads `CHIP:SHAPE`.

  Args:
    text: such as "v5p:8x8x8", "v5e:16x16", "h100:8" or "cpu:8".

  Raises:
    ValueError: if the chip is unknown, or the shape is not one of its.

  Example:
    >>> parse_topology("v5e:16x16").devices
    256
  """
  match = re.fullmatch(r"(?P<chip>\w+):(?P<shape>[1-9]\d*(x[1-9]\d*)*)", text)
  if match is None or match["chip"] not in CHIPS:
    known = [f"{name}:{_like(chip.axes)}" for name, chip in CHIPS.items()]
    raise ValueError(
      f"`--topology` must be CHIP:SHAPE, one of {known} with numbers for A, B"
      f" and C; got {text!r}."
    )
  chip = CHIPS[match["chip"]]
  shape = [int(n) for n in match["shape"].split("x")]
  if len(shape) != chip.axes:
    raise ValueError(
      f"`--topology` {text!r} must be {match['chip']}:{_like(chip.axes)}, with"
      f" {chip.axes} number(s); got {len(shape)}."
    )
  return Topology(text, chip, math.prod(shape))


def _like(axes: int) -> str:
  return "x".join("ABC"[:axes])
