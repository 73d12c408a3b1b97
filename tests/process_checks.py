"""The checks at the start of a run, in one of several processes.

  python process_checks.py PORT COUNT PROCESS SHARED OWN

Prints what each check says, when configs differ and when workdirs do, and which
rows of a batch the process reads on meshes that mix the processes' devices.
"""

import functools
import pathlib
import sys

import jax
import numpy as np

from crcm_jax import training
from crcm_jax.training import _lock, sharding


def main(port, count, process, shared, own):
  """Prints one line a check."""
  process = int(process)
  address = f"127.0.0.1:{port}"
  training.initialize(address, int(count), process, timeout=24.0)
  same = {"seed": 0, "loop": {"keep": 2}}
  training.check_start(same, pathlib.Path(shared))
  print("SAME: passed")
  _try("IN USE", _enter, shared)  # the test's own process is there
  _rows("MIXED", np.array([[0], [2], [1], [3]]))
  _rows("SHARED", np.array([[0, 2], [1, 3]]))
  others = {"seed": process, "loop": {"keep": 2 + process}}
  start = functools.partial(functools.partial, training.check_start)
  _try("CONFIG", start(others), shared)
  _try("WORKDIR", start(same), own)
  _try("READ-ONLY", start(same), "/proc/none")


def _rows(name, order):
  """Reads rows of a batch; `order` holds the devices of data x context."""
  devices = np.array(jax.devices())[order].reshape(len(order), 1, -1, 1)
  mesh = jax.sharding.Mesh(devices, sharding.AXES)
  rows = sharding.local_rows(mesh, 8)
  batch = sharding.place_batch(np.array(rows), mesh)
  print(f"{name}: {rows} of {sharding.fetch(batch).tolist()}")


def _enter(workdir):
  _lock._GRACE = 0.5
  with _lock.holding(workdir):
    pass


def _try(name, check, workdir):
  try:
    check(pathlib.Path(workdir))
  except (ValueError, OSError) as error:
    print(f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
  main(*sys.argv[1:])
