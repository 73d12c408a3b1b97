"""The arguments with which several processes run a command together."""

import argparse

from crcm_jax import training

EXAMPLES = """
On TPU pods, GKE, SLURM and Open MPI the same command on every host is enough.
By hand, give each process its number:
  crcm train ... --coordinator host0:1234 --num-processes 2 --process-id 0
  crcm train ... --coordinator host0:1234 --num-processes 2 --process-id 1"""


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds them to a command's parser."""
  group = command.add_argument_group(
    "several processes", "found by JAX on TPU pods, GKE, SLURM and Open MPI"
  )
  group.add_argument(
    "--coordinator",
    metavar="HOST:PORT",
    help="process 0, and a free port there, as all processes reach it",
  )
  group.add_argument("--num-processes", type=int, metavar="N", help="of all")
  group.add_argument(
    "--process-id", type=int, metavar="I", help="of this one, from 0"
  )
  group.add_argument(
    "--start-timeout",
    type=float,
    default=training.START_TIMEOUT,
    metavar="SECONDS",
    help="to wait for the other processes (default: %(default)g)",
  )


def initialize(arguments: argparse.Namespace) -> None:
  """Connects this process to the others, if there are any.

  Args:
    arguments: of the command line.

  Raises:
    ValueError: if they do not fit together.
    OSError: if the others cannot be reached, or not in time.
  """
  training.initialize(
    arguments.coordinator,
    arguments.num_processes,
    arguments.process_id,
    timeout=arguments.start_timeout,
  )
