"""The evaluation of an experiment: which networks, at how many steps.

The rows of the table are the networks that the experiment started from or
trained: diffusion models at the steps of the ODE and, where they are causal,
at the students' steps too; students at each number of steps they have a
schedule for. It is always the moving average that is sampled.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax

from crcm_jax import data, evaluation
from crcm_jax._typing import Array, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training import _networks, _processes
from crcm_jax.training._experiment import Experiment
from crcm_jax.training._loop import Folders
from crcm_jax.training._samplers import Generator
from crcm_jax.training._stages import Stage
from crcm_jax.training._writers import read_metrics


class Network(NamedTuple):
  """One network of an experiment, and the steps to sample it with."""

  name: str
  generate: Generator
  params: Params
  steps: tuple[int, ...]


def evaluate_experiment(
  experiment: Experiment,
  folders: Folders,
  *,
  command: str,
  on_row: Callable[[str, dict[str, float]], None] | None = None,
) -> pathlib.Path:
  """Scores an experiment's networks and writes `report.html`.

  Of several processes each scores all, and the first one writes.

  Args:
    experiment: what was trained.
    folders: where.
    command: the command that made the run, for the report.
    on_row: called with each finished row.

  Returns:
    The path of the report.

  Raises:
    ValueError: if the config has no evaluation, or a stage is not trained.
  """
  settings = experiment.evaluation
  if settings is None:
    raise ValueError(
      "`config.evaluation` is missing, so there is nothing to evaluate. Add"
      " `evaluation=dict(classifier=FILE)`."
    )
  *_, last = experiment.stages.values()
  results = evaluation.evaluate(
    samplers(experiment, folders.experiment),
    last.dataset.clips(folders.data, settings.batch_size),
    evaluation.load_classifier(_networks.find(settings.classifier)),
    key=jax.random.key(settings.seed),
    pattern=_pattern(experiment),
    decode=last.dataset.decode,
    num_clips=settings.num_clips,
    num_reference=settings.num_reference,
    num_examples=settings.num_examples,
    on_row=on_row,
  )
  path = folders.experiment / "report.html"
  if not _processes.is_first_process():
    return path
  curves = {
    name: read_metrics(folders.experiment / name / "metrics.jsonl")
    for name in experiment.stages
  }
  return evaluation.write_report(
    path,
    results,
    command=command,
    config=experiment.config,
    curves=curves,
  )


def samplers(
  experiment: Experiment, folder: pathlib.Path
) -> dict[str, evaluation.Sampler]:
  """Returns the rows of an experiment's table, teachers first.

  Args:
    experiment: what was trained.
    folder: the experiment's folder.

  Raises:
    ValueError: if a stage is not trained.
  """
  return {
    f"{network.name}, {steps} step{'s' if steps > 1 else ''}": (
      functools.partial(_sample, network, steps)
    )
    for network in networks(experiment, folder)
    for steps in network.steps
  }


def _sample(
  network: Network, steps: int, key: PRNGKeyArray, batch: data.Batch
) -> Array:
  return network.generate(network.params, key, batch, steps)


def networks(experiment: Experiment, folder: pathlib.Path) -> Iterator[Network]:
  """Iterates over an experiment's networks.

  Args:
    experiment: what was trained.
    folder: the experiment's folder.
  """
  yield from _teachers(experiment, folder)
  for stage in experiment.stages.values():
    yield Network(
      stage.name,
      stage.sampler(),
      jax.device_put(stage.load(stage.name, folder)),
      _few_steps(stage)
      if stage.kind.few_step
      else _ode_steps(stage, stage.pattern),
    )


def _teachers(
  experiment: Experiment, folder: pathlib.Path
) -> Iterator[Network]:
  """Iterates over the teachers that the experiment does not train itself."""
  seen = set(experiment.stages)
  for stage in experiment.stages.values():
    for role, name in (("real", "bidirectional"), ("teacher", "teacher")):
      source = stage.init.get(role)
      if source is None or _networks.parse_source(source).where in seen:
        continue
      seen.add(_networks.parse_source(source).where)
      pattern = None if role == "real" else stage.pattern
      yield Network(
        name,
        stage.sampling.ode(stage.networks[role], pattern),
        jax.device_put(stage.load_role(role, folder)),
        _ode_steps(stage, pattern),
      )


def _few_steps(stage: Stage) -> tuple[int, ...]:
  return stage.sampling.few_steps


def _ode_steps(stage: Stage, pattern: ChunkPattern | None) -> tuple[int, ...]:
  """Few steps of a causal teacher show what distilling gains."""
  usual = (stage.sampling.ode_steps,)
  return usual if pattern is None else usual + _few_steps(stage)


def _pattern(experiment: Experiment) -> ChunkPattern:
  for stage in experiment.stages.values():
    if stage.pattern is not None:
      return stage.pattern
  raise ValueError(
    "`config.evaluation` needs a causal stage, whose chunks it compares; the"
    f" stages {list(experiment.stages)} are bidirectional."
  )
