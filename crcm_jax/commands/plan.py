"""`crcm plan`: what a config will take, on hardware that is not there."""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from crcm_jax import training
from crcm_jax.training import plan as planning
from crcm_jax.training import sharding
from crcm_jax.training.plan import Topology

EXAMPLES = """examples:
  crcm plan experiments/configs/moving_digits.py --topology cpu:8
  crcm plan experiments/configs/paper.py:tf,14b,v5p-64
  crcm plan experiments/configs/paper.py:tf_scm --topology h100:8 --mesh fsdp=8
  crcm plan CONFIG --topology v5e:16x16 --stage sf_dmd --json plan.json

For TPUs the step is compiled by libtpu (`pip install libtpu`), without a TPU.
For GPUs and CPUs it is compiled for as many fake CPU devices: an estimate.
docs/plan.md says how to read the output."""


def plan(arguments: argparse.Namespace) -> None:
  """Says what each step of a config takes on some devices, and if it fits."""
  config = training.load_config(arguments.config, arguments.overrides)
  name: Any = arguments.topology or config.get("topology")
  if name is None:
    raise ValueError(
      "`--topology` must say for which devices; the config has no `topology`."
    )
  topology = planning.parse_topology(name)
  planning.prepare(topology)  # Reading the config may wake JAX up.
  stages = training.read_experiment(config).stages
  if arguments.stage is not None:
    if arguments.stage not in stages:
      raise ValueError(
        f"`--stage` must be one of {list(stages)}; got {arguments.stage!r}."
      )
    stages = {arguments.stage: stages[arguments.stage]}
  limit = arguments.memory and arguments.memory * 2**30
  results = [
    result
    for stage in stages.values()
    for result in _plan_stage(
      _with_mesh(stage, arguments.mesh), topology, limit
    )
  ]
  if arguments.json is not None:
    content = {"command": arguments.command, "steps": results}
    pathlib.Path(arguments.json).write_text(json.dumps(content, indent=2))


def _plan_stage(
  stage: training.Stage, topology: Topology, limit: float | None
) -> list[dict[str, Any]]:
  """Prints the plan of each step of a stage, and returns them as JSON."""
  results = []
  for phase in stage.objectives:
    step = planning.plan_step(stage, phase, topology, limit=limit)
    change = None if step.fits else planning.suggest(stage, phase, step)
    print(planning.report(stage, phase, topology, step, change), flush=True)
    results.append(
      {
        "stage": stage.name,
        "phase": phase,
        "topology": topology.name,
        "estimate": topology.chip.platform != "tpu",
        **planning.as_json(step),
        "change": change and change._asdict() | {"memory": change.memory.total},
      }
    )
  return results


def _with_mesh(
  stage: training.Stage, mesh: Mapping[str, int] | None
) -> training.Stage:
  return stage if mesh is None else dataclasses.replace(stage, mesh=dict(mesh))


def mesh(text: str) -> dict[str, int]:
  """Reads `AXIS=N,...`.

  Raises:
    ArgumentTypeError: if it has another form.
  """
  sizes = {}
  for part in text.split(","):
    axis, _, number = part.partition("=")
    if axis not in sharding.AXES or not number.isdigit() or int(number) < 1:
      raise argparse.ArgumentTypeError(
        f"must be AXIS=N,... with axes of {sharding.AXES}; got {text!r}"
      )
    sizes[axis] = int(number)
  return sizes


def gibibytes(text: str) -> float:
  """Reads a positive number.

  Raises:
    ArgumentTypeError: if it is none.
  """
  try:
    size = float(text)
  except ValueError:
    size = 0.0
  if not 0 < size < float("inf"):
    raise argparse.ArgumentTypeError(f"must be GiB, above 0; got {text!r}")
  return size


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm plan`."""
  command.add_argument(
    "config",
    metavar="FILE.py[:VARIANT]",
    help="what to plan; --config.KEY=VALUE changes one of its keys",
  )
  command.add_argument(
    "--topology",
    metavar="CHIP:SHAPE",
    help="the devices: v5p:8x8x8, v5e:16x16, h100:8, cpu:8; the config's own"
    " `topology` by default",
  )
  command.add_argument("--stage", help="plan this stage only")
  command.add_argument(
    "--mesh",
    type=mesh,
    metavar="AXIS=N[,...]",
    help="devices along data, fsdp, context and tensor, in place of those in"
    " the config; data is what the others leave",
  )
  command.add_argument(
    "--memory",
    type=gibibytes,
    metavar="GIB",
    help="of a device, if not what its chip has",
  )
  command.add_argument(
    "--json", metavar="FILE", help="write the plan there too"
  )
