"""Breaks short trainings of the moving digits, and prints what shows it.

  python tools/reproduce_symptoms.py [NAME ...]

Each symptom of docs/symptoms.md is one setting of the quickstart made wrong.
The shipped teachers are trained for a few steps as they should be and then
with that setting, on batches of 4 clips of 6 frames, and one number of both is
compared: a metric, or a statistic of the sample videos. Runs on a CPU; most of
the time is compilation.
"""

import argparse
import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from crcm_jax import evaluation, models, training
from crcm_jax.training import _networks
from crcm_jax.training._config import differences as differences
from crcm_jax.training._stages import Stage

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = ROOT / "experiments" / "configs" / "moving_digits.py"
WEIGHTS = "experiments/moving_digits/weights"
LONG = 21  # frames of a rollout; the teachers were trained on 9

Changes: TypeAlias = tuple[tuple[str, Any], ...]
"""Settings by their dotted names."""

_SMALL = {
  "data.batch_size": 4,
  "data.frames": 6,
  "data.train_clips": 512,
  "data.test_clips": 96,
  "loop.tensorboard": False,
}
_HEALTHY = {
  "consistency": {
    "consistency.optimizer.warmup_steps": 5,
    "consistency.objective.tangent_warmup": 10,
  },
  "self_forcing": {
    "self_forcing.init.student": f"{WEIGHTS}/causal.safetensors",
    "self_forcing.optimizer.learning_rate": 5e-4,
    "self_forcing.optimizer.warmup_steps": 0,
    "self_forcing.critic_optimizer.learning_rate": 5e-4,
    "self_forcing.critic_optimizer.warmup_steps": 0,
  },
  "causal": {"data.frames": LONG, "sampling.ode_steps": 30},
}


class Trained(NamedTuple):
  """What a short training left behind."""

  metrics: list[dict[str, float]]
  samples: list[dict[str, float]]
  state: training.TrainState
  start: Any
  """The student's first parameters."""


class Symptom(NamedTuple):
  """A setting made wrong, and the number that shows it."""

  number: str
  """What is compared, in words."""
  broken: str
  """The wrong setting, in words."""
  measure: Callable[[str, Changes], float]
  """Returns the number."""
  stage: str
  changes: Changes
  """The wrong setting."""
  factor: float
  """The broken run's number over the healthy one's is at least this; if this
  is below 1, at most."""

  def shows(self, healthy: float, broken: float) -> bool:
    """Whether the broken run stands out as it should."""
    if self.factor > 1:
      return broken >= self.factor * healthy
    return broken <= self.factor * healthy


def build(name: str, changes: Changes, steps: int = 1) -> Stage:
  """Builds a stage of the quickstart, shrunk and changed."""
  config: Any = training.load_config(str(CONFIG)).to_dict()
  stages = {key: config.pop(key) for key in config["stages"]}
  stages["causal"] = {
    "objective": {"name": "teacher_forcing"},
    "optimizer": {"learning_rate": 1e-3},
    "init": {"student": f"{WEIGHTS}/causal.safetensors"},
  }
  del config["evaluation"]
  del config["sampling"]["mid_times"]["4"]  # two steps a chunk will do
  config |= {"stages": (name,), name: stages[name]}
  every = {f"loop.{what}_every": steps for what in ("checkpoint", "sample")}
  for key, value in (
    *(_SMALL | every | _HEALTHY[name]).items(),
    (f"{name}.steps", steps),
    *changes,
  ):
    *path, last = key.split(".")
    functools.reduce(dict.__getitem__, path, config)[last] = value
  return training.read_experiment(config).stages[name]


@functools.cache
def train(name: str, changes: Changes, steps: int) -> Trained:
  """Trains a stage for some steps."""
  stage = build(name, changes, steps)
  with tempfile.TemporaryDirectory() as folder:
    folders = training.Folders(pathlib.Path(folder), _data_folder())
    start = stage.init_state(folders.experiment).student
    state = training.train_stage(stage, folders)
    read = lambda kind: training.read_metrics(
      folders.experiment / name / f"{kind}.jsonl"
    )
    return Trained(read("metrics"), read("samples"), state, start)


def first(metric: str, lines: int = 1) -> Callable[[str, Changes], float]:
  """Measures a metric at the first lines that have it."""

  def measure(stage: str, changes: Changes) -> float:
    rows = train(stage, changes, _steps(stage)).metrics
    return float(np.mean([r[metric] for r in rows if metric in r][:lines]))

  return measure


def at_the_end(metric: str) -> Callable[[str, Changes], float]:
  """Measures a metric over the last third of the steps."""

  def measure(stage: str, changes: Changes) -> float:
    rows = train(stage, changes, _steps(stage)).metrics
    return float(np.mean([r[metric] for r in rows[-len(rows) // 3 :]]))

  return measure


def pixels(statistic: str) -> Callable[[str, Changes], float]:
  """Measures the last chunk of the last sample videos."""

  def measure(stage: str, changes: Changes) -> float:
    row = train(stage, changes, _steps(stage)).samples[-1]
    return [v for k, v in row.items() if k.startswith(f"{statistic}/")][-1]

  return measure


def lag(stage: str, changes: Changes) -> float:
  """Returns how far the average is behind, as a share of the way gone."""
  trained = train(stage, changes, _steps(stage))
  student, ema = trained.state.student, trained.state.ema
  distance = lambda a, b: np.sqrt(
    sum(
      float(np.sum(np.square(np.asarray(x) - np.asarray(y))))
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
  )
  return distance(ema, student) / distance(trained.start, student)


def drift(stage: str, changes: Changes) -> float:
  """Returns the last chunk's drift in a long rollout of the teacher."""
  made = build(stage, changes)
  batches = made.dataset.batches(_data_folder(), seed=0)
  batch = jax.tree.map(
    lambda *a: np.concatenate(a), *(next(batches) for _ in range(4))
  )
  params = made.init_state(_data_folder()).student
  video = made.dataset.decode(made.sampler()(params, jax.random.key(0), batch))
  assert made.pattern is not None
  spans = made.pattern.spans(LONG)
  return float(
    evaluation.chunk_statistics(np.asarray(video), spans).drift[:, -1].mean()
  )


def _steps(stage: str) -> int:
  return {"consistency": 20, "self_forcing": 26}[stage]


@functools.cache
def _data_folder() -> pathlib.Path:
  return pathlib.Path(tempfile.gettempdir(), "crcm_symptoms")


def _random_weights() -> str:
  """Writes weights of a critic that nobody trained, and names them."""
  path = _data_folder() / "random.safetensors"
  if not path.exists():
    _data_folder().mkdir(parents=True, exist_ok=True)
    network = build("self_forcing", ()).model
    params = _networks.init_params(network, jax.random.key(1))
    models.save_params(path, params, {})
  return str(path)


def symptoms() -> dict[str, Symptom]:
  """Returns the symptoms by name."""
  scm, dmd = "consistency", "self_forcing"
  return {
    "learning_rate": Symptom(
      "tangent norm, last third",
      "`optimizer.learning_rate` 1e-2, not 3e-4",
      at_the_end("student/tangent_norm"),
      scm,
      ((f"{scm}.optimizer.learning_rate", 1e-2),),
      10.0,
    ),
    "normaliser": Symptom(
      "loss, last third",
      "`normaliser_eps` 1e4, not 0.1",
      at_the_end("student/loss"),
      scm,
      ((f"{scm}.objective.normaliser_eps", 1e4),),
      0.1,
    ),
    "warmup": Symptom(
      "normaliser, first step",
      "`tangent_warmup` 0, not half of the steps",
      first("student/normaliser"),
      scm,
      ((f"{scm}.objective.tangent_warmup", 0),),
      3.0,
    ),
    "rounding": Symptom(
      "tangent norm, first step",
      '`tangent_pass="finite_difference"` and `network.dtype="bfloat16"`',
      first("student/tangent_norm"),
      scm,
      (
        (f"{scm}.objective.tangent_pass", "finite_difference"),
        ("network.dtype", "bfloat16"),
      ),
      10.0,
    ),
    "average": Symptom(
      "distance of the average from the student, of the way gone",
      "`ema_rate` 0.28, not 0.1",
      lag,
      scm,
      (("ema_rate", 0.28),),
      1.5,
    ),
    "guidance": Symptom(
      "saturated pixels, last chunk of the samples",
      "`objective.guidance` 12, not 2",
      pixels("saturated"),
      dmd,
      ((f"{dmd}.objective.guidance", 12.0),),
      1.15,
    ),
    "cold_critic": Symptom(
      "critic's error, its first step",
      "`init.fake` random, not the bidirectional teacher",
      first("critic/error"),
      dmd,
      ((f"{dmd}.init.fake", _random_weights()),),
      2.0,
    ),
    "slow_critic": Symptom(
      "standard deviation of the samples' last chunk",
      "`critic_optimizer.learning_rate` 1e-6, not 5e-4",
      pixels("std"),
      dmd,
      ((f"{dmd}.critic_optimizer.learning_rate", 1e-6),),
      1.5,
    ),
    "exposure": Symptom(
      "drift of the seventh chunk",
      "1 step a chunk without distillation, not 30",
      drift,
      "causal",
      (("sampling.ode_steps", 1),),
      2.0,
    ),
  }


def main(argv: Sequence[str] | None = None) -> int:
  """Prints a row for each symptom; returns how many did not show."""
  known = symptoms()
  parser = argparse.ArgumentParser(description="Reproduces docs/symptoms.md.")
  parser.add_argument("names", nargs="*", metavar="NAME", help=str([*known]))
  names = parser.parse_args(argv).names or [*known]
  if unknown := sorted(set(names) - known.keys()):
    parser.error(f"NAME must be one of {[*known]}; got {unknown}.")
  print("| name | number | healthy | broken | setting |\n|---|---|---|---|---|")
  missing = 0
  for name in names:
    s = known[name]
    values = [s.measure(s.stage, changes) for changes in ((), s.changes)]
    shown = " | ".join(f"{value:.4g}" for value in values)
    shows = s.shows(*values)
    missing += not shows
    note = "" if shows else " (does not show)"
    print(f"| `{name}` | {s.number}{note} | {shown} | {s.broken} |", flush=True)
  return missing


if __name__ == "__main__":
  sys.exit(main())
