"""Runs several processes of a test, and never longer than it says."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a process ended.

  Attributes:
    code: its exit status, or minus the signal that ended it.
    output: what it printed.
    seconds: after which it ended.
  """

  code: int
  output: str
  seconds: float


def free_port():
  """Returns a port that nothing listens at."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def run(commands, *, devices=1, timeout=900):
  """Runs scripts of this folder side by side, each with some CPU devices.

  Args:
    commands: the words after `python` for each.
    devices: of each process.
    timeout: seconds; then all are killed and the test fails.

  Returns:
    An `Ended` for each.

  Raises:
    AssertionError: if one does not end, with the output of all.
  """
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder, str(i)) for i in range(len(commands))]
    start = time.monotonic()
    children = [
      _start(command, path, devices)
      for command, path in zip(commands, paths, strict=True)
    ]
    try:
      seconds = _wait(children, start, timeout)
    finally:
      for child in children:
        child.kill()
        child.wait()
    texts = [path.read_text(errors="replace") for path in paths]
  ended = [
    Ended(child.returncode, text, after)
    for child, text, after in zip(children, texts, seconds, strict=True)
  ]
  shown = "\n".join(
    f"--- {i}: {e.code}\n{e.output}" for i, e in enumerate(ended)
  )
  assert None not in seconds, f"not ended after {timeout} s:\n{shown}"
  print(shown)  # pytest shows it if the test fails.
  return ended


def _start(command, path, devices):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".cache" / "jax"),
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    "PYTHONUNBUFFERED": "1",
  }
  with path.open("w") as output:
    return subprocess.Popen(
      [sys.executable, str(HERE / command[0]), *map(str, command[1:])],
      stdout=output,
      stderr=subprocess.STDOUT,
      env=env,
    )


def _wait(children, start, timeout):
  """Returns after how many seconds each ended, None for those that did not."""
  seconds = [None] * len(children)
  while None in seconds and time.monotonic() < start + timeout:
    for i, child in enumerate(children):
      if seconds[i] is None and child.poll() is not None:
        seconds[i] = time.monotonic() - start
    time.sleep(0.05)
  return seconds


def by_hand(count, process, *, timeout=60, port):
  """Returns the arguments that tell a process which one it is."""
  return [
    *("--coordinator", f"127.0.0.1:{port}"),
    *("--num-processes", count, "--process-id", process),
    *("--start-timeout", timeout),
  ]
