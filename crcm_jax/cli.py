"""The command `crcm`: train, sample, evaluate, encode, convert, and so on."""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax import models, training
from crcm_jax.commands import _workdir, CACHE
from crcm_jax.commands import convert as convert_command
from crcm_jax.commands import encode as encode_command
from crcm_jax.commands import plan as plan_command
from crcm_jax.commands import processes as processes_command
from crcm_jax.commands import sample as sample_command
from crcm_jax.commands import vbench as vbench_command
from crcm_jax.training import _config, _lock, _networks

_LOG = logging.getLogger("crcm_jax")

_DIGITS = "experiments/configs/moving_digits.py"

_EXAMPLES = {
  "train": f"""examples:
  crcm train --config {_DIGITS} --workdir runs/digits
  crcm train --config {_DIGITS}:gpu --workdir runs/gpu --stage causal
  crcm train --config {_DIGITS}:runlocal --workdir runs/try --config.seed=1

The same command goes on where a run was stopped. Afterwards the workdir has a
folder for each stage (checkpoints, metrics.jsonl, samples) and report.html.
"""
  + processes_command.EXAMPLES,
  "sample": sample_command.EXAMPLES,
  "evaluate": """examples:
  crcm evaluate runs/digits

Scores the networks of an experiment that `crcm train` made, and writes
report.html and report.json into its workdir. VBench scores with a tool of its
own: `crcm vbench-clips` makes the clips, `crcm vbench-score` the totals.""",
  "export": """examples:
  crcm export runs/teachers/causal --out weights/causal.safetensors

Beside the file, NAME.json says where the weights come from (config, command,
step, hash) and NAME.log.jsonl holds the training's metrics.""",
  "convert": convert_command.EXAMPLES,
  "encode": encode_command.EXAMPLES,
  "vbench-clips": vbench_command.CLIPS_EXAMPLES,
  "vbench-score": vbench_command.SCORE_EXAMPLES,
  "plan": plan_command.EXAMPLES,
  "print-config": f"""examples:
  crcm print-config --config {_DIGITS}:gpu
  crcm print-config --config {_DIGITS} --config.seed=1""",
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command.

  Args:
    argv: the words after `crcm`; those of this process if None.

  Returns:
    The exit status: 0, also for a run that SIGTERM stopped and that is saved;
    130 if Ctrl-C did; 2 for a bad argument.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  parser = _parser()
  arguments, rest = parser.parse_known_args(words)
  overrides = [w.removeprefix("--config.") for w in rest if _is_change(w)]
  if unknown := [word for word in rest if not _is_change(word)]:
    parser.error(f"unrecognized arguments: {' '.join(unknown)}")
  if overrides and "config" not in arguments:
    parser.error(
      "only `train`, `plan` and `print-config` take --config.KEY=VALUE"
    )
  _log_to_stderr()
  _keep_compiled_programs()
  arguments.overrides = overrides
  arguments.command = shlex.join(["crcm", *words])
  try:
    arguments.run(arguments)
  except (ValueError, OSError, ImportError, training.NonFiniteUpdate) as error:
    print(f"crcm: {error}", file=sys.stderr)
    return 2
  except training.Interrupted as error:
    print(f"crcm: {error}", file=sys.stderr)
    return error.exit_status
  return 0


def train(arguments: argparse.Namespace) -> None:
  """Trains all stages of a config, or one, and writes the report."""
  processes_command.initialize(arguments)
  with training.ending_together():
    _train(arguments)


def _train(arguments: argparse.Namespace) -> None:
  config = training.load_config(arguments.config, arguments.overrides)
  experiment = training.read_experiment(config)
  folders = _folders(arguments)
  if arguments.stage is None:
    chosen = list(experiment.stages.values())
  else:
    chosen = [_stage_named(experiment, arguments.stage)]
  training.check_start(
    {**experiment.config, "--stage": arguments.stage}, folders.experiment
  )
  for stage in chosen:  # A mistake in the last one is told at the start.
    training.check_stage(stage, folders)
  # All at once: also where the other run is at a later stage, or evaluates.
  with _lock.holding(*(folders.experiment / stage.name for stage in chosen)):
    _train_stages(arguments, experiment, chosen, folders)


def _train_stages(
  arguments: argparse.Namespace,
  experiment: training.Experiment,
  chosen: Sequence[training.Stage],
  folders: training.Folders,
) -> None:
  first = training.is_first_process()
  if first:
    folders.experiment.mkdir(parents=True, exist_ok=True)
    record = {"command": arguments.command, "config": experiment.config}
    _write_json(folders.experiment / "experiment.json", record)
  else:
    _LOG.setLevel(logging.WARNING)
  start = time.monotonic()
  with _stops_at_sigterm():
    for stage in chosen:
      if first:
        _write_command(folders.experiment / stage.name, arguments.command)
      training.train_stage(stage, folders)
    if arguments.stage is None and experiment.evaluation is not None:
      _report(experiment, folders, arguments.command)
  _LOG.info("Done in %.1f minutes.", (time.monotonic() - start) / 60)


@contextlib.contextmanager
def _stops_at_sigterm() -> Iterator[None]:
  """Also where there is nothing to save, SIGTERM is no failure of a run."""

  def stop(number: int, frame: Any) -> None:
    del frame
    raise training.Interrupted(
      "stopped, with nothing new to save; the same command goes on.", number
    )

  old = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, old)


def evaluate(arguments: argparse.Namespace) -> None:
  """Scores the networks of an experiment and writes its report."""
  folders = _folders(arguments)
  record = _workdir.read_experiment(folders.experiment)
  experiment = training.read_experiment(record["config"])
  _report(experiment, folders, record["command"])


def export(arguments: argparse.Namespace) -> None:
  """Writes a stage's moving average as safetensors, with its origin."""
  source = _networks.parse_source(arguments.source)
  workdir = _networks.find(source.where)
  if not workdir.is_dir():
    raise ValueError(
      "`SOURCE` must be the workdir of a stage; got the file"
      f" {str(workdir)!r}. `crcm convert` changes files of weights."
    )
  origin = _networks.load_source(arguments.source, workdir=pathlib.Path())
  out = pathlib.Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  models.save_params(
    out, origin.params, origin.about, dtype=jnp.dtype(arguments.dtype)
  )
  config = {k: v for k, v in origin.about.items() if k != "at_step"}
  about = {
    "command": (workdir / "command.txt").read_text().strip(),
    "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
    "config_hash": _config.config_hash(config),
    **origin.about,
  }
  _write_json(out.with_suffix(".json"), about)
  rows = training.read_metrics(workdir / "metrics.jsonl")
  every = max(1, len(rows) // 200)
  log = "".join(json.dumps(row) + "\n" for row in rows[every - 1 :: every])
  out.with_suffix(".log.jsonl").write_text(log)
  print(out)


def print_config(arguments: argparse.Namespace) -> None:
  """Prints a config after all changes, once it is known to be readable."""
  config = training.load_config(arguments.config, arguments.overrides)
  training.read_experiment(config)
  print(config)


def _report(
  experiment: training.Experiment, folders: training.Folders, command: str
) -> None:
  _LOG.info("Evaluating.")
  report = training.evaluate_experiment(
    experiment,
    folders,
    command=command,
    on_row=lambda name, row: _LOG.info("%s: %s", name, _row_text(row)),
  )
  if training.is_first_process():
    print(f"The report is {report.absolute()}")


def _row_text(row: dict[str, float]) -> str:
  return ", ".join(f"{name} {value:.3g}" for name, value in row.items())


def _stage_named(experiment: training.Experiment, name: str) -> training.Stage:
  if name not in experiment.stages:
    raise ValueError(
      f"`--stage` must be one of {list(experiment.stages)}; got {name!r}."
    )
  return experiment.stages[name]


def _folders(arguments: argparse.Namespace) -> training.Folders:
  return training.Folders(
    pathlib.Path(arguments.workdir), pathlib.Path(arguments.data_dir)
  )


def _write_command(workdir: pathlib.Path, command: str) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "command.txt").write_text(command + "\n")


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + "\n")


def _is_change(word: str) -> bool:
  return word.startswith("--config.")


def _log_to_stderr() -> None:
  """Prints the library's own messages; those of others only if warnings."""
  if not _LOG.handlers:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _LOG.addHandler(handler)
    # Some library sets up the root logger, which would say it again.
    _LOG.propagate = False
  _LOG.setLevel(logging.INFO)


def _keep_compiled_programs() -> None:
  """Keeps compiled programs for the next run, where JAX was told nothing."""
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "programs"))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="crcm",
    description="Distil video diffusion models into streaming generators.",
    epilog="`crcm COMMAND --help` shows examples. Compiled programs are kept"
    f" in {CACHE / 'programs'}, or in JAX_COMPILATION_CACHE_DIR.",
    allow_abbrev=False,
  )
  commands = parser.add_subparsers(required=True, metavar="COMMAND")
  _add_train(commands)
  _add_evaluate(commands)
  _add_export(commands)
  _add_others(commands)
  _add_print_config(commands)
  return parser


def _add(commands: Any, name: str, run: Any) -> argparse.ArgumentParser:
  command = commands.add_parser(
    name,
    help=run.__doc__.split("\n")[0],
    description=run.__doc__,
    epilog=_EXAMPLES[name],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  command.set_defaults(run=run)
  return command


def _add_config(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--config",
    required=True,
    metavar="FILE.py[:VARIANT]",
    help="what to run; --config.KEY=VALUE changes one of its keys",
  )


def _add_data_dir(command: argparse.ArgumentParser) -> None:
  command.add_argument(
    "--data_dir",
    default=str(CACHE / "data"),
    help="where datasets are built and read (default: %(default)s)",
  )


def _add_train(commands: Any) -> None:
  command = _add(commands, "train", train)
  _add_config(command)
  command.add_argument(
    "--workdir", required=True, help="where the run is kept, and resumed from"
  )
  command.add_argument(
    "--stage", help="train this stage only, and write no report"
  )
  _add_data_dir(command)
  processes_command.add_arguments(command)


def _add_evaluate(commands: Any) -> None:
  command = _add(commands, "evaluate", evaluate)
  command.add_argument("workdir", metavar="WORKDIR", help="of `crcm train`")
  _add_data_dir(command)


def _add_export(commands: Any) -> None:
  command = _add(commands, "export", export)
  command.add_argument("source", metavar="SOURCE", help="a stage's workdir")
  command.add_argument("--out", required=True, help="the file *.safetensors")
  command.add_argument(
    "--dtype", default="bfloat16", help="to store (default: %(default)s)"
  )


def _add_others(commands: Any) -> None:
  """Adds the commands that have modules of their own."""
  sample_command.add_arguments(_add(commands, "sample", sample_command.sample))
  convert = _add(commands, "convert", convert_command.convert)
  convert_command.add_arguments(convert)
  plan_command.add_arguments(_add(commands, "plan", plan_command.plan))
  encode = _add(commands, "encode", encode_command.encode)
  encode_command.add_arguments(encode)
  clips = _add(commands, "vbench-clips", vbench_command.write_clips)
  vbench_command.add_clips_arguments(clips)
  score = _add(commands, "vbench-score", vbench_command.score)
  vbench_command.add_score_arguments(score)


def _add_print_config(commands: Any) -> None:
  _add_config(_add(commands, "print-config", print_config))


if __name__ == "__main__":
  sys.exit(main())
