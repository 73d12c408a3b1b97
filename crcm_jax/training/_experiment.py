"""Experiments: stages that hand parameters to each other, then a report.

An experiment's config names its stages in order and has a section for each.
What they share stands beside the sections, and a section may override it:

    stages=("consistency", "self_forcing"),
    seed=0, network=dict(...), pattern=dict(...), data=dict(...), ...
    consistency=dict(steps=300, objective=dict(...), ...),
    self_forcing=dict(steps=600, data=dict(batch_size=8), ...),
    evaluation=dict(...)
    topology="v5p:4x4x4",  # what `crcm plan` plans for, unless told otherwise

The whole config is read, and its mistakes are found, before anything is
trained.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from crcm_jax.training import _config
from crcm_jax.training._stages import read_stage, Stage

SHARED = (
  *("seed", "network", "pattern", "data", "sampling"),
  *("loop", "mesh", "sharding", "ema_rate", "working_copy"),
)
"""The keys of an experiment that all its stages have."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
  """How an experiment is evaluated; see `evaluation.evaluate`.

  Attributes:
    classifier: the file of the frame classifier.
    num_clips: clips of each row.
    num_reference: real clips to compare with.
    num_examples: clips of each row to show.
    batch_size: clips sampled at once.
    seed: of the samplers' noise.
  """

  classifier: str
  num_clips: int = 256
  num_reference: int = 512
  num_examples: int = 4
  batch_size: int = 64
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  """A config, read to the last key.

  Attributes:
    stages: the stages in order.
    evaluation: how it is evaluated; None for not.
    topology: the devices that it is planned for (`crcm plan`), such as
      "v5p:4x4x4"; None for any.
    config: the whole config as JSON values.
  """

  stages: dict[str, Stage]
  evaluation: Evaluation | None
  topology: str | None
  config: dict[str, Any]


def read_experiment(config: Any) -> Experiment:
  """Builds all stages of a config.

  Args:
    config: the experiment's `ConfigDict`, or its JSON values.

  Raises:
    ValueError: if a key is missing, unknown or not read by anything, or a
      value does not fit.
  """
  config = _config.as_dict(config)
  root = _config.Section(config)
  names = tuple(root["stages"])
  shared = {key: root.take(key) for key in SHARED if key in root}
  own = {name: root[name].as_dict() for name in names}
  evaluation = None
  if "evaluation" in root:
    evaluation = root["evaluation"].call(Evaluation)
  topology = root.get("topology")
  root.check_all_read()
  return Experiment(
    stages={
      name: read_stage(name, _merge(shared, own[name]), names) for name in names
    },
    evaluation=evaluation,
    topology=topology,
    config=config,
  )


def _merge(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a stage's resolved config: its own values go before shared ones."""
  merged = {
    key: {**shared[key], **value}
    for key, value in own.items()
    if key in shared and isinstance(value, dict)
  }
  return {**shared, **own, **merged}
