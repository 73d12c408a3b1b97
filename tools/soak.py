"""Kills training runs at random moments, and checks that nothing is lost.

    python tools/soak.py --kills 50 --workdir runs/soak   # `make soak`

For each kind of stage a tiny run goes through once without a stop, and once
more with one SIGKILL after another of the process that trains and writes. After
each kill the next process must go on from the newest checkpoint that the dead
one finished. At the end the state, bit for bit, and `metrics.jsonl`, byte for
byte, must be those of the run that never stopped.

A kill comes in one of three ways: any moment after the start (imports are done;
the run reads its checkpoint, or cuts its log), some moment after a step, or
some moment after a temporary checkpoint folder is seen. It counts as inside the
write of a checkpoint only if, when the process is gone, that folder is there
still, or a folder without its list of hashes.

Most of a restart is imports, tracing and compiling, which the kills are not
about. So an ordinary process, which also makes the run without a stop, compiles
the steps and keeps them in a file; and the processes to be killed are forked
from one that has imported everything and has no device yet. They do all the
rest: read the checkpoint, train, write. `tests/training/test_resume.py` kills
whole commands as well.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from crcm_jax import training
from crcm_jax.training import _experiment, _manifest, sharding

ROOT = pathlib.Path(__file__).parent.parent

BASE = "diffusion"  # the networks that other stages start from

STAGES = (
  *("bidirectional_diffusion", "teacher_forcing", "diffusion_forcing"),
  *("discrete_consistency", "continuous_consistency", "mean_flow"),
  *("ode_regression", "bidirectional_ode_regression", "self_forcing", "joint"),
)
"""Each is called by its objective's name."""

DIGITS = dict(
  name="moving_digits", batch_size=2, frames=2, train_clips=16, test_clips=8
)
"""Data whose position is an iterator's, for the stage `teacher_forcing`."""


@dataclasses.dataclass
class Kills:
  """What the kills of one run hit.

  Attributes:
    kills: how many there were.
    in_start: how many came before the process had read its checkpoint.
    in_write: how many left a checkpoint half-written.
    in_list: how many left one that lacks only its list of hashes.
    lost: how often a process did not go on from the newest checkpoint.
    corrupt: how often a finished checkpoint was found damaged.
  """

  kills: int = 0
  in_start: int = 0
  in_write: int = 0
  in_list: int = 0
  lost: int = 0
  corrupt: int = 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A run of a stage, in a workdir of its own.

  Attributes:
    name: of the stage.
    steps: of the stage.
    folder: of this stage's runs; `kept.pkl` is there.
    which: the run's folder in it.
  """

  name: str
  steps: int
  folder: pathlib.Path
  which: str

  def folders(self) -> training.Folders:
    """Returns where the run reads and writes."""
    return training.Folders(self.folder / self.which, self.folder / "data")

  def log(self) -> pathlib.Path:
    """Returns the file that the newest process logs to."""
    return self.folder / self.which / "log.txt"

  def workdir(self) -> pathlib.Path:
    """Returns the stage's workdir."""
    return self.folder / self.which / self.name


class Kept(NamedTuple):
  """What a process keeps of a stage for others.

  Attributes:
    shapes: of the state.
    first: the state to start from, NumPy arrays.
    frozen: the frozen networks, NumPy arrays.
    programs: of each phase, the compiled step, and zeros for its metrics.
  """

  shapes: Any
  first: Any
  frozen: Any
  programs: dict[Any, tuple[bytes, dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ready(training.Stage):
  """A stage with all that was kept of it: nothing is traced or compiled."""

  kept: Kept

  def on(self, mesh: Any) -> "Ready":
    """Returns this stage, whose steps are compiled for one device."""
    del mesh
    return self

  def state_shapes(self) -> Any:
    """Returns the shapes and dtypes of the state."""
    return self.kept.shapes

  def frozen_shapes(self) -> Any:
    """Returns what has the frozen networks' shapes."""
    return self.kept.frozen

  def init_state(self, workdir: pathlib.Path, shardings: Any = None) -> Any:
    """Returns the state to start from."""
    del workdir
    return jax.device_put(self.kept.first, shardings)

  def load_frozen(self, workdir: pathlib.Path, shardings: Any = None) -> Any:
    """Returns the frozen networks."""
    del workdir
    return jax.device_put(self.kept.frozen, shardings)

  def train_steps(self, shardings: Any = None) -> Any:
    """Loads the compiled steps."""
    del shardings
    batch = self.dataset.shapes()
    state = self.kept.shapes
    taken = jax.tree.structure(((state, self.kept.frozen, batch, 0), {}))
    steps = {}
    for phase, (program, metrics) in self.kept.programs.items():
      given = jax.tree.structure((state, metrics))
      run = serialize_executable.deserialize_and_load(program, taken, given)
      steps[phase] = run
    return steps


def keep(stage: training.Stage, experiment: pathlib.Path) -> Kept:
  """Compiles a stage, and loads what it starts from."""
  first, frozen = stage.init_state(experiment), stage.load_frozen(experiment)
  given = training.step_arguments(stage, sharding.make_mesh())
  programs = {}
  for phase, step in stage.train_steps(given.shardings()).items():
    lowered = step.lower(*given)
    program, _, _ = serialize_executable.serialize(lowered.compile())
    programs[phase] = program, jax.tree.map(lambda _: 0, lowered.out_info[1])
  first, frozen = jax.device_get((first, frozen))
  return Kept(stage.state_shapes(), first, frozen, programs)


def read_stages(name: str, steps: int) -> tuple[training.Stage, training.Stage]:
  """Returns the stage that others start from, and the one of this name."""
  tiny: Any = importlib.import_module("tiny")
  section = {
    "mean_flow": tiny.MEAN_FLOW,
    "bidirectional_ode_regression": tiny.ODE_REGRESSION,
    "self_forcing": tiny.SELF_FORCING,
    "joint": tiny.JOINT,
  }.get(name, tiny.DIFFUSION | dict(objective=dict(name=name)))
  if name.endswith("consistency") or name == "ode_regression":
    section |= dict(init=dict(student=BASE, teacher=BASE))
  config: dict[str, Any] = tiny.config(
    stages=(BASE, name),
    loop=dict(
      checkpoint_every=3, log_every=2, milestone_every=60, tensorboard=False
    ),
  )
  config |= {BASE: tiny.DIFFUSION | dict(steps=2)}
  config |= {name: section | dict(steps=steps)}
  if name == "teacher_forcing":
    config["data"] = DIGITS
    config["network"] |= dict(
      in_channels=16, out_channels=16, text_width=32, text_length=8
    )
  stages = _experiment.read_experiment(config).stages
  return stages[BASE], stages[name]


def start(run: Run) -> int:
  """Goes on with a run in a new process, and returns its number.

  It is a fork of this one, which has no device and no thread of JAX's.
  """
  with run.log().open("w") as log, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # JAX warns of forks whatever they do
    pid = os.fork()
    if pid == 0:
      _go_on(run, log.fileno())
  return pid


def _go_on(run: Run, log: int) -> None:
  """Trains a run's stage to its end, which is this process's end."""
  os.dup2(log, 1)
  os.dup2(log, 2)
  try:
    logging.basicConfig(level=logging.INFO, force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    _, stage = read_stages(run.name, run.steps)
    kept = pickle.loads((run.folder / "kept.pkl").read_bytes())
    training.train_stage(Ready(**vars(stage), kept=kept), run.folders())
    os._exit(0)
  except BaseException:
    traceback.print_exc()
    os._exit(1)


def wait(pid: int, until: Callable[[], bool] = lambda: False) -> int | None:
  """Waits for a process's end, or for something that happens before.

  Returns:
    The exit status, negative for a signal; None if the process goes on.

  Raises:
    TimeoutError: if it neither ends nor gets there in five minutes.
  """
  deadline = time.monotonic() + 300
  while time.monotonic() < deadline:
    ended, status = os.waitpid(pid, os.WNOHANG)
    if ended:
      return os.waitstatus_to_exitcode(status)
    if until():
      return None
    time.sleep(5e-4)
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  raise TimeoutError("a training process hangs; see its log.txt")


@dataclasses.dataclass(frozen=True)
class Watched:
  """What the files of a run show from outside."""

  run: Run

  @property
  def workdir(self) -> pathlib.Path:
    """Where the files are."""
    return self.run.workdir()

  def step(self) -> int:
    """Returns the step of the last whole line of metrics."""
    rows = training.read_metrics(self.workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0

  def is_writing(self) -> bool:
    """Whether there is a checkpoint folder that is not finished."""
    pattern = f"checkpoints/*{ocp.utils.TMP_DIR_SUFFIX}"
    return any(self.workdir.glob(pattern))

  def is_listing(self) -> bool:
    """Whether there is a checkpoint that lacks only its list of hashes."""
    return any(not _manifest.is_in(folder) for folder in self._numbered())

  def finished(self) -> int:
    """Returns the newest checkpoint's step; 0 without one."""
    whole = (int(f.name) for f in self._numbered() if _manifest.is_in(f))
    return max(whole, default=0)

  def damaged(self) -> int:
    """Counts the checkpoints that a run has found damaged."""
    return len(list(self.workdir.glob("checkpoints/*.damaged")))

  def began_at(self) -> int | None:
    """Returns the step that the process went on from; None before that."""
    log = self.run.log().read_text()
    if f"{self.workdir.name}: " not in log:
      return None
    _, found, rest = log.partition(f"{self.workdir.name} goes on from step ")
    return int(rest.partition(".")[0]) if found else 0

  def _numbered(self) -> list[pathlib.Path]:
    found = self.workdir.glob("checkpoints/[0-9]*")
    return [folder for folder in found if folder.name.isdecimal()]


def kill_once(run: Run, rng: random.Random, count: Kills) -> None:
  """Starts a process, kills it at a random moment, and looks what it left.

  Raises:
    RuntimeError: if the process ends before it is killed.
  """
  seen = Watched(run)
  before = seen.finished()
  pid = start(run)
  way = rng.choices(("start", "step", "write"), (1, 4, 5))[0]
  status = None
  if way == "start":
    time.sleep(rng.uniform(0, 0.5))
  else:
    target = before + rng.randint(1, 5)
    far = lambda: seen.began_at() is not None and seen.step() >= target
    status = wait(pid, far)
    if status is None and way == "write":
      status = wait(pid, seen.is_writing)
    time.sleep(rng.uniform(0, 0.02))
  if status is None:
    os.kill(pid, signal.SIGKILL)
    status = wait(pid)
  if status != -signal.SIGKILL:
    raise RuntimeError(f"a process ended with status {status}; see its log.txt")
  count.kills += 1
  began = seen.began_at()
  count.in_start += began is None
  if began is not None:
    count.lost += began != before
    count.in_write += seen.is_writing()
    count.in_list += seen.is_listing()
  count.corrupt += seen.damaged()


def finish(run: Run) -> None:
  """Goes on with a run to its end.

  Raises:
    RuntimeError: if that fails.
  """
  if status := wait(start(run)):
    raise RuntimeError(f"a process ended with status {status}; see its log.txt")


def differences(a: pathlib.Path, b: pathlib.Path) -> list[str]:
  """Lists what differs between two stages' workdirs at their ends."""
  whole, killed = (training.Checkpoints(w).read(None) for w in (a, b))
  found = [
    jax.tree_util.keystr(path)
    for (path, x), y in zip(
      jax.tree.leaves_with_path(whole.state),
      jax.tree.leaves(killed.state),
      strict=True,
    )
    if x.dtype != y.dtype or np.asarray(x).tobytes() != np.asarray(y).tobytes()
  ]
  if whole[2:] != killed[2:] or whole.step != killed.step:
    found.append("data position, config or metrics in the checkpoint")
  one, other = ((w / "metrics.jsonl").read_bytes() for w in (a, b))
  return found if one == other else [*found, "metrics.jsonl"]


def reference(run: Run) -> None:
  """Trains a stage without a stop, in an ordinary process.

  It also keeps what the processes to be killed need.
  """
  configure()
  folders = run.folders()
  base, stage = read_stages(run.name, run.steps)
  training.train_stage(base, folders)
  with _no_cache():  # a program from there cannot be kept again
    kept = keep(stage, folders.experiment)
  (run.folder / "kept.pkl").write_bytes(pickle.dumps(kept))
  # How often it saves changes nothing, and saving takes most of its time.
  loop = dataclasses.replace(stage.loop, checkpoint_every=run.steps)
  training.train_stage(dataclasses.replace(stage, loop=loop), folders)


def configure() -> None:
  """Sets JAX up for small programs on the CPU."""
  sys.path.insert(0, str(ROOT / "tests"))  # the tiny networks
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  """Turns JAX's cache of compiled programs off."""
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


def soak(whole: Run, kills: int, seed: int) -> Kills:
  """Trains one stage without a stop and once more with kills.

  Args:
    whole: the run without a stop; its folder is emptied.
    kills: how many.
    seed: of the moments.

  Returns:
    What the kills hit.

  Raises:
    RuntimeError: if the runs end with other states or metrics.
  """
  shutil.rmtree(whole.folder, ignore_errors=True)
  make = multiprocessing.get_context("spawn").Process(
    target=reference, args=(whole,)
  )
  make.start()
  make.join()
  killed = dataclasses.replace(whole, which="killed")
  killed.log().parent.mkdir()
  rng, count = random.Random(f"{whole.name} {seed}"), Kills()
  while count.kills < kills:
    kill_once(killed, rng, count)
  finish(killed)
  count.corrupt += Watched(killed).damaged()
  if found := differences(whole.workdir(), killed.workdir()):
    raise RuntimeError(f"{whole.name} ended with another {', '.join(found)}")
  return count


def main(argv: list[str] | None = None) -> int:
  """Prints a line for each stage; returns 1 if anything was lost."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("--kills", type=int, default=50, help="for each stage")
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/soak")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--stages", nargs="*", choices=STAGES)
  arguments = parser.parse_args(argv)
  names = arguments.stages or STAGES
  if len(names) > 1:  # each in a process of its own, to be forked from
    words = ("--kills", arguments.kills, "--workdir", arguments.workdir)
    words = (*words, "--seed", arguments.seed)
    command = (sys.executable, __file__, *map(str, words), "--stages")
    return max(subprocess.call([*command, name]) for name in names)
  (name,) = names
  configure()
  begin = time.monotonic()
  steps = 6 * arguments.kills + 12  # enough to be killed so often on the way
  run = Run(name, steps, arguments.workdir / name, "whole")
  count = soak(run, arguments.kills, arguments.seed)
  about = dataclasses.asdict(count) | {
    "seconds": round(time.monotonic() - begin)
  }
  print(json.dumps({"stage": name, **about}), flush=True)
  return int(count.lost > 0 or count.corrupt > 0)


if __name__ == "__main__":
  sys.exit(main())
