"""The command `crcm`: train, sample, evaluate, encode, convert, and so on."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import data, evaluation, models, training
from crcm_jax.commands import encode as encode_command
from crcm_jax.commands import sample as sample_command
from crcm_jax.commands import vbench as vbench_command
from crcm_jax.training import _config, _networks, _stages

_LOG = logging.getLogger("crcm_jax")

CACHE = pathlib.Path(
  os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"), "crcm_jax"
)
"""Compiled programs and datasets, which runs share."""

_DIGITS = "experiments/configs/moving_digits.py"

_EXAMPLES = {
  "train": f"""examples:
  crcm train --config {_DIGITS} --workdir runs/digits
  crcm train --config {_DIGITS}:gpu --workdir runs/gpu --stage causal
  crcm train --config {_DIGITS}:runlocal --workdir /tmp/try --config.seed=1

The same command goes on where a run was stopped. Afterwards the workdir has a
folder for each stage (checkpoints, metrics.jsonl, samples) and report.html.""",
  "sample": """examples:
  crcm sample runs/digits --out clip.gif --caption "seven moving left, fast"
  crcm sample runs/digits/self_forcing:live@300 --out clip.mp4 --steps 2
  crcm sample experiments/moving_digits/weights/causal.safetensors --out a.png

SOURCE is an experiment (its last stage), a stage's workdir, or a safetensors
file, with [:ema|:live][@STEP]. Chunks, schedules and context come from it.
"""
  + sample_command.EXAMPLES,
  "evaluate": """examples:
  crcm evaluate runs/digits

Scores the networks of an experiment that `crcm train` made, and writes
report.html and report.json into its workdir.""",
  "export": """examples:
  crcm export runs/teachers/causal --out weights/causal.safetensors

Beside the file, NAME.json says where the weights come from (config, command,
step, hash) and NAME.log.jsonl holds the training's metrics.""",
  "convert": """examples:
  crcm convert Wan2.1-T2V-1.3B/ --out wan.safetensors --dtype bfloat16
  crcm convert dmd.pt --group generator_ema --pattern 3,3 --out a.safetensors
  crcm convert a.safetensors --layout diffusers --out model.safetensors

SOURCE is a Wan transformer, autoencoder or text encoder: a .safetensors, .pt
or .pth file, the index of shards, a folder with one of these, in the original
layout or that of diffusers; or a file of ours. What it says of itself (stage,
chunk pattern, schedules) goes along. No code in a pickle is run.""",
  "encode": encode_command.EXAMPLES,
  "vbench-clips": vbench_command.CLIPS_EXAMPLES,
  "vbench-score": vbench_command.SCORE_EXAMPLES,
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
    parser.error("only `train` and `print-config` take --config.KEY=VALUE")
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
    return 130 if error.signal == signal.SIGINT else 0
  return 0


def train(arguments: argparse.Namespace) -> None:
  """Trains all stages of a config, or one, and writes the report."""
  config = training.load_config(arguments.config, arguments.overrides)
  experiment = training.read_experiment(config)
  folders = _folders(arguments)
  if arguments.stage is None:
    chosen = list(experiment.stages.values())
  else:
    chosen = [_stage_named(experiment, arguments.stage)]
  folders.experiment.mkdir(parents=True, exist_ok=True)
  record = {"command": arguments.command, "config": experiment.config}
  _write_json(folders.experiment / "experiment.json", record)
  start = time.monotonic()
  with _stops_at_sigterm():
    for stage in chosen:
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
  record = _read_experiment_json(folders.experiment)
  experiment = training.read_experiment(record["config"])
  _report(experiment, folders, record["command"])


def sample(arguments: argparse.Namespace) -> None:
  """Generates one clip and writes it as a video."""
  if sample_command.wants_wan(arguments):
    sample_command.sample(arguments, CACHE)
    return
  (steps,) = arguments.steps or (None,)
  make, _ = _clip_maker(arguments.source, steps, arguments.frames)
  video = make(arguments.caption, arguments.seed)
  path = evaluation.write_video(arguments.out, video, fps=arguments.fps or 8.0)
  print(path)


def _clip_maker(
  source: str, steps: int | None, frames: int | None
) -> tuple[evaluation.MakeClip, Callable[[], dict[str, Any]]]:
  """Returns what makes clips of (caption, seed), and what tells how."""
  origin = _networks.load_source(_of_last_stage(source), workdir=pathlib.Path())
  stage = _stages.stage_of(origin)
  params = _networks.adopt(
    origin, stage.model, pattern=stage.pattern, name="SOURCE"
  )
  sampler = stage.sampler()

  def make(caption: str, seed: int) -> np.ndarray:
    batch = _batch_of(stage, caption, frames)
    latents = sampler(params, jax.random.key(seed), batch, steps)
    (video,) = np.asarray(stage.dataset.decode(latents))
    return video

  def record() -> dict[str, Any]:
    pattern = stage.pattern
    return {
      "checkpoint_sha256": _params_hash(params),
      "stage": stage.name,
      "pattern": None if pattern is None else dataclasses.asdict(pattern),
      "schedule": {"steps": steps, **dataclasses.asdict(stage.sampling)},
      "frames": frames,
    }

  return make, record


def _params_hash(params: Any) -> str:
  """Returns the SHA-256 of parameters, with their names and dtypes."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    array = np.asarray(leaf)
    total.update(f"{path} {array.dtype} {array.shape}".encode())
    total.update(np.ascontiguousarray(array).tobytes())
  return total.hexdigest()


def export(arguments: argparse.Namespace) -> None:
  """Writes a stage's moving average as safetensors, with its origin."""
  source = _networks.parse_source(arguments.source)
  origin = _networks.load_source(arguments.source, workdir=pathlib.Path())
  out = pathlib.Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  models.save_params(
    out, origin.params, origin.about, dtype=jnp.dtype(arguments.dtype)
  )
  workdir = _networks.find(source.where)
  about = {
    "command": (workdir / "command.txt").read_text().strip(),
    "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
    "config_hash": _config.config_hash(origin.about),
    **origin.about,
  }
  _write_json(out.with_suffix(".json"), about)
  rows = training.read_metrics(workdir / "metrics.jsonl")
  every = max(1, len(rows) // 200)
  log = "".join(json.dumps(row) + "\n" for row in rows[every - 1 :: every])
  out.with_suffix(".log.jsonl").write_text(log)
  print(out)


def convert(arguments: argparse.Namespace) -> None:
  """Converts weights from and to the files of PyTorch projects."""
  out = pathlib.Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  about: dict[str, Any] = {}
  if arguments.about is not None:
    about |= json.loads(pathlib.Path(arguments.about).read_text())
  if arguments.stage is not None:
    about["stage"] = arguments.stage
  if arguments.pattern is not None:
    about["pattern"] = dataclasses.asdict(arguments.pattern)
  config = None
  if arguments.network is not None:
    entries = json.loads(pathlib.Path(arguments.network).read_text())
    config = models.WanConfig.from_wan(entries)
  models.convert(
    arguments.source,
    out,
    layout=arguments.layout,
    config=config,
    group=arguments.group,
    dtype=arguments.dtype,
    about=about,
    force=arguments.force,
  )
  print(out)


def vbench_clips(arguments: argparse.Namespace) -> None:
  """Makes the clips that the `vbench` tool scores."""
  make, record = _clip_maker(
    arguments.source, arguments.steps, arguments.frames
  )
  vbench_command.write_clips(arguments, make, record())


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
  print(f"The report is {report.absolute()}")


def _row_text(row: dict[str, float]) -> str:
  return ", ".join(f"{name} {value:.3g}" for name, value in row.items())


def _stage_named(experiment: training.Experiment, name: str) -> training.Stage:
  if name not in experiment.stages:
    raise ValueError(
      f"`--stage` must be one of {list(experiment.stages)}; got {name!r}."
    )
  return experiment.stages[name]


def _of_last_stage(text: str) -> str:
  """Turns a source that names an experiment into that of its last stage."""
  where = _networks.parse_source(text).where
  if not pathlib.Path(where, "experiment.json").exists():
    return text
  config = _read_experiment_json(pathlib.Path(where))["config"]
  return f"{where}/{config['stages'][-1]}{text.removeprefix(where)}"


def _batch_of(
  stage: training.Stage, caption: str, frames: int | None
) -> data.Batch:
  """Returns a batch of one example, whose latents only give a shape."""
  _, usual, *rest = stage.dataset.shapes().x_0.shape
  return data.Batch(
    jnp.zeros((1, frames or usual, *rest)),
    jnp.asarray(stage.dataset.encode([caption])),
    jnp.asarray(stage.dataset.encode([data.NULL_CAPTION])),
  )


def _folders(arguments: argparse.Namespace) -> training.Folders:
  return training.Folders(
    pathlib.Path(arguments.workdir), pathlib.Path(arguments.data_dir)
  )


def _read_experiment_json(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / "experiment.json"
  if not path.exists():
    raise ValueError(
      f"WORKDIR must be one that `crcm train` made; {str(folder)!r} has no"
      " experiment.json."
    )
  return json.loads(path.read_text())


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
  _add_sample(commands)
  _add_evaluate(commands)
  _add_export(commands)
  _add_convert(commands)
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


def _add_sample(commands: Any) -> None:
  command = _add(commands, "sample", sample)
  command.add_argument(
    "source", metavar="SOURCE", nargs="?", help="of `crcm train`, to sample"
  )
  command.add_argument(
    "--out", required=True, help="the video: *.mp4, *.gif or *.png"
  )
  command.add_argument(
    "--caption",
    default="seven moving left and up, fast; two moving down",
    help="what to show (default: %(default)r)",
  )
  command.add_argument(
    "--steps",
    type=sample_command.steps,
    metavar="N[,N...]",
    help="denoising steps a chunk, the last number for all further ones; the"
    " most by default, for Wan 4 or 50",
  )
  command.add_argument(
    "--frames",
    type=int,
    help="latent frames, as many as in training; for Wan RGB frames, 81",
  )
  command.add_argument("--seed", type=int, default=0, help="of the noise")
  command.add_argument(
    "--fps", type=float, help="frames a second; 8, for Wan 16"
  )
  sample_command.add_arguments(command)


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


def _add_convert(commands: Any) -> None:
  command = _add(commands, "convert", convert)
  command.add_argument("source", metavar="SOURCE", help="what to convert")
  command.add_argument("--out", required=True, help="the file *.safetensors")
  command.add_argument(
    "--layout",
    default="crcm",
    choices=("crcm", "wan", "rcm", "diffusers"),
    help="of OUT (default: %(default)s)",
  )
  command.add_argument(
    "--group", help="which of several networks, such as generator_ema"
  )
  command.add_argument(
    "--dtype", type=jnp.dtype, help="to store; as it is by default"
  )
  command.add_argument("--stage", help="that made the weights; kept in OUT")
  command.add_argument(
    "--pattern",
    type=sample_command.pattern,
    metavar="FIRST,REST",
    help="latent frames of the first and of each later chunk; kept in OUT",
  )
  command.add_argument(
    "--about",
    metavar="FILE.json",
    help="more to keep in OUT, such as `sampling`, the schedules",
  )
  command.add_argument(
    "--network",
    metavar="config.json",
    help="of the original, where heads are not 128 wide",
  )
  command.add_argument(
    "--force",
    action="store_true",
    help="let these contradict what SOURCE says of itself",
  )


def _add_others(commands: Any) -> None:
  """Adds the commands that have modules of their own."""
  encode = _add(commands, "encode", encode_command.encode)
  encode_command.add_arguments(encode)
  clips = _add(commands, "vbench-clips", vbench_clips)
  vbench_command.add_clips_arguments(clips)
  score = _add(commands, "vbench-score", vbench_command.score)
  vbench_command.add_score_arguments(score)


def _add_print_config(commands: Any) -> None:
  _add_config(_add(commands, "print-config", print_config))


if __name__ == "__main__":
  sys.exit(main())
