"""The checks at the start of a run, in one of several processes.

  python process_checks.py PORT COUNT PROCESS SHARED OWN

Prints what each check says, when configs differ and when workdirs do.
"""

import pathlib
import sys

from crcm_jax import training


def main(port, count, process, shared, own):
  """Prints one line a check."""
  process = int(process)
  address = f"127.0.0.1:{port}"
  training.initialize(address, int(count), process, timeout=24.0)
  same = {"seed": 0, "loop": {"keep": 2}}
  training.check_start(same, pathlib.Path(shared))
  print("SAME: passed")
  others = {"seed": process, "loop": {"keep": 2 + process}}
  _try("CONFIG", others, shared)
  _try("WORKDIR", same, own)
  _try("READ-ONLY", same, "/proc/none")


def _try(name, config, workdir):
  try:
    training.check_start(config, pathlib.Path(workdir))
  except (ValueError, OSError) as error:
    print(f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
  main(*sys.argv[1:])
