"""`crcm train` as a child process of a test, with something going wrong.

  python process_child.py MISHAP PROCESS ARGUMENT...

The mishap befalls the process of that number only, as it reads its third batch,
which the loop does ahead of the step.
"""

import functools
import os
import signal
import subprocess
import sys
import time

import jax
import orbax.checkpoint as ocp

import crcm_jax.cli
from crcm_jax import evaluation, training
from crcm_jax.training import _checkpoints, _data, _manifest

AT = 3
HEARTBEAT = 10  # seconds
STILL = 4 * HEARTBEAT
"""Seconds for which a process freezes or hangs."""


def fail():
  """Raises, as a full disk does."""
  raise OSError(28, "No space left on device")


def terminate():
  """Asks this process to stop, as a scheduler does."""
  os.kill(os.getpid(), signal.SIGTERM)


def terminate_and_hash_slowly():
  """The same; process 0 takes its time to list the checkpoint's files."""
  terminate()


def kill():
  """Ends this process at once, as a lack of memory does."""
  os.kill(os.getpid(), signal.SIGKILL)


def freeze():
  """Stops all threads of this process, as a host does that stands still."""
  goes_on = f"sleep {STILL}; kill -CONT {os.getpid()}"
  subprocess.Popen(["sh", "-c", goes_on], stdout=subprocess.DEVNULL)
  os.kill(os.getpid(), signal.SIGSTOP)


def hang():
  """Stops the thread that reads, as a file system does that stands still."""
  time.sleep(STILL)


def cannot_read():
  """Lets this process fail to read a checkpoint that is whole."""

  def restore(*arguments, **settings):
    raise OSError(5, "Input/output error")

  ocp.StandardCheckpointHandler.restore = restore


def cannot_write():
  """Lets this process fail to write a checkpoint."""
  _checkpoints.Checkpoints.save = lambda *arguments, **settings: fail()


def cannot_report():
  """Lets this process fail if it tries to write the report."""
  evaluation.write_report = lambda *arguments, **settings: fail()


class Batches:
  """Batches of which the third brings a mishap."""

  def __init__(self, batches, mishap):
    self._batches, self._mishap, self._count = batches, mishap, 0

  def __next__(self):
    self._count += 1
    if self._count == AT:
      self._mishap()
    return next(self._batches)

  def __getattr__(self, name):
    return getattr(self._batches, name)


def main(mishap, process, *arguments):
  """Runs the command."""
  jax.config.update("jax_disable_most_optimizations", True)
  if mishap in ("freeze", "hang"):
    training.initialize = functools.partial(
      training.initialize, heartbeat=HEARTBEAT
    )
  if mishap == "terminate_and_hash_slowly":
    write = _manifest.write
    _manifest.write = lambda folder: (time.sleep(9), write(folder))
  if mishap.startswith("cannot"):
    if f"--process-id {process}" in " ".join(arguments):
      globals()[mishap]()
    mishap = "none"
  usual = _data.MovingDigits.batches

  def batches(*given):
    made = usual(*given)
    if mishap != "none" and jax.process_index() == int(process):
      return Batches(made, globals()[mishap])
    return made

  _data.MovingDigits.batches = batches
  return crcm_jax.cli.main(["train", *arguments])


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
