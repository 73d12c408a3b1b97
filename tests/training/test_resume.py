"""Real commands that are killed, stopped, and run out of disk."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import tiny

from crcm_jax.training import Checkpoints, read_metrics

ROOT = pathlib.Path(__file__).parents[2]
SOAK = ROOT / "tools" / "soak.py"
KINDS = (
  *("bidirectional_diffusion", "teacher_forcing", "diffusion_forcing"),
  *("discrete_consistency", "continuous_consistency", "mean_flow"),
  *("ode_regression", "bidirectional_ode_regression", "self_forcing", "joint"),
)

ENVIRONMENT = os.environ | {
  "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
}


def python(*words, start_new_session=False, **changes):
  """Starts Python in a process of its own."""
  return subprocess.Popen(
    [sys.executable, *map(str, words)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=ENVIRONMENT | changes,
    start_new_session=start_new_session,
  )


def run(*words, **changes):
  """Runs Python to its end, and returns what it printed."""
  process = python(*words, **changes)
  out, error = process.communicate(timeout=900)
  assert process.returncode == 0, error[-3000:]
  return out + error


class Command:
  """`crcm train` for two stages: one alone, and one with a critic."""

  def __init__(self, folder):
    self.workdir = folder
    config = tiny.config(
      stages=("diffusion", "matching"),
      diffusion=tiny.DIFFUSION | dict(steps=40),
      matching=tiny.SELF_FORCING | dict(steps=40),
      loop=dict(checkpoint_every=3, log_every=2, tensorboard=False),
    )
    folder.mkdir()
    (folder / "config.py").write_text(
      "import ml_collections\n"
      f"def get_config(): return ml_collections.ConfigDict({config})\n"
    )
    self.words = ("-m", "crcm_jax.cli", "train", "--workdir", folder)
    self.words += ("--config", folder / "config.py")

  def start(self):
    return python(*self.words)

  def finish(self):
    return run(*self.words)

  def stop(self, number, ready):
    """Starts the command and sends it a signal as soon as it is ready."""
    process = self.start()
    while not ready():
      assert process.poll() is None, process.communicate()[1]
      time.sleep(1e-3)
    time.sleep(random.uniform(0, 0.02))
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    return process.returncode, error

  def step(self, stage):
    rows = read_metrics(self.workdir / stage / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0

  def writes(self, stage):
    folder = self.workdir / stage / "checkpoints"
    return any(folder.glob("*.orbax-checkpoint-tmp"))

  def end(self, stage):
    """Returns all that must be the same, whatever happened on the way."""
    restored = Checkpoints(self.workdir / stage).read(None)
    bits = jax.tree.map(lambda a: np.asarray(a).tobytes(), restored.state)
    log = (self.workdir / stage / "metrics.jsonl").read_text()
    return bits, restored.step, restored.data, restored.metrics, log


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  command = Command(tmp_path_factory.mktemp("whole") / "run")
  command.finish()
  return command


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
  """A run that is killed, asked to stop, killed in a write, and finished."""
  command = Command(tmp_path_factory.mktemp("stopped") / "run")
  at = random.randint(4, 12)
  killed, _ = command.stop(
    signal.SIGKILL, lambda: command.step("diffusion") >= at
  )
  at += random.randint(6, 12)
  asked = command.stop(signal.SIGTERM, lambda: command.step("diffusion") >= at)
  saved = Checkpoints(command.workdir / "diffusion").read(None).step
  at = random.randint(7, 30)  # the write is not the first one's
  in_write, _ = command.stop(
    signal.SIGKILL,
    lambda: command.step("matching") >= at and command.writes("matching"),
  )
  said = command.finish()
  return command, killed, asked, saved, in_write, said


@pytest.mark.parametrize("stage", ["diffusion", "matching"])
def test_a_killed_command_goes_on_to_the_same_bits(whole, stopped, stage):
  command, killed, _, _, in_write, said = stopped
  assert killed == in_write == -signal.SIGKILL
  assert "matching goes on from step" in said
  assert command.end(stage) == whole.end(stage)


def test_sigterm_saves_the_step_it_is_at_and_exits_with_0(stopped):
  _, _, (status, error), saved, _, _ = stopped
  assert status == 0, error
  assert f"diffusion was stopped and saved at step {saved}; the same" in error


def test_random_draws_follow_from_seed_and_step_alone(whole):
  """No key is stored: the config's seed and the state's step are enough."""
  restored = Checkpoints(whole.workdir / "matching").read(None)
  assert restored.config["seed"] == 0
  assert restored.state["step"] == restored.step == 40
  dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(restored.state)}
  assert dtypes == {"float32", "int32"}  # keys are of others
  assert {"student", "student_opt_state", "ema", "fake", "fake_opt_state"} <= (
    restored.state.keys()
  )
  assert (
    restored.state["student_updates"] + restored.state["fake_updates"] == 40
  )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_stage_survives_kills_at_random_moments(kind, tmp_path):
  seed = random.randrange(10**6)
  words = ("--kills", 4, "--workdir", tmp_path, "--seed", seed)
  said = run(SOAK, *words, "--stages", kind)
  (line,) = [line for line in said.splitlines() if line.startswith("{")]
  count = json.loads(line)
  assert count["kills"] == 4
  assert count["lost"] == count["corrupt"] == 0


@pytest.mark.slow
def test_worker_processes_leave_signals_to_the_one_that_trains(tmp_path):
  """A scheduler signals the whole group; a kill must leave no worker."""
  config = ROOT / "tests" / "process_config.py"
  words = ("-m", "crcm_jax.cli", "train", "--config", config)
  words += ("--workdir", tmp_path / "run", "--data_dir", tmp_path / "data")
  words += ("--config.loop.data_workers=1", "--config.diffusion.steps=9999")
  words += ("--config.loop.checkpoint_every=9999",)
  log = tmp_path / "run" / "diffusion" / "metrics.jsonl"

  def start(steps):
    process = python(*words, start_new_session=True)
    while len(read_metrics(log)) < steps:
      assert process.poll() is None, process.communicate()[1]
      time.sleep(0.1)
    return process

  process = start(5)
  os.killpg(process.pid, signal.SIGTERM)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 0, error
  assert "was stopped and saved at step" in error
  process = start(len(read_metrics(log)) + 3)
  process.kill()
  process.communicate(timeout=60)  # workers hold the pipe, too
  for _ in range(200):
    try:
      os.killpg(process.pid, 0)
    except ProcessLookupError:
      break
    time.sleep(0.1)
  else:
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a worker process is left")


DISK = """
import errno, pathlib, resource, signal, subprocess, sys, time
import numpy as np
import jax
import tiny
from crcm_jax import cli
from crcm_jax.training import Checkpoints, _data

folder, *modes = sys.argv[1:]
folder = pathlib.Path(folder)
sections = dict(diffusion=tiny.DIFFUSION | dict(steps=12))
config = tiny.config(**sections)
config["loop"] |= dict(tensorboard=True)
(folder / "config.py").write_text(
  "import ml_collections\\n"
  f"def get_config(): return ml_collections.ConfigDict({config})\\n"
)

def train(mode):
  words = ("train", "--config", folder / "config.py", "--workdir")
  return cli.main([*map(str, words), str(folder / mode)])

def end(mode):
  restored = Checkpoints(folder / mode / "diffusion").read(None)
  leaves = jax.tree.leaves(restored.state)
  log = (folder / mode / "diffusion" / "metrics.jsonl").read_text()
  return restored.step, [np.asarray(a).tobytes() for a in leaves], log

def spoil(mode):
  if mode == "limit":  # of the size of a file, as a quota has
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, most))
  elif mode == "full":
    with (folder / mode / "filler").open("wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(1000))
      except OSError as error:
        assert error.errno == errno.ENOSPC
  else:
    held = str(folder / mode / "diffusion" / "checkpoints")
    subprocess.run(["mount", "--bind", held, held], check=True)
    remount = ["mount", "-o", "remount,ro,bind", held]
    # Busy while the checkpoint before this batch is still being written.
    for _ in range(100):
      if subprocess.run(remount, capture_output=True).returncode == 0:
        return
      time.sleep(0.1)
    raise TimeoutError(f"{held} stays busy")

def mend(mode):
  if mode == "limit":
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
  elif mode == "full":
    (folder / mode / "filler").unlink()
  else:
    held = str(folder / mode / "diffusion" / "checkpoints")
    subprocess.run(["umount", held], check=True)

class Spoiling(_data._Noise):
  mode = None
  def __next__(self):
    if self._position == 7 and Spoiling.mode:
      spoil(Spoiling.mode)
      Spoiling.mode = None
    return super().__next__()

_data._Noise = Spoiling
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit raises
assert train("whole") == 0
for mode in modes:
  (folder / mode).mkdir()
  if mode != "limit":
    words = ("mount", "-t", "tmpfs", "-o", "size=4m", "none", folder / mode)
    subprocess.run(words, check=True)
  Spoiling.mode = mode
  status = train(mode)
  mend(mode)
  left = Checkpoints(folder / mode / "diffusion").read(None).step
  print("STOPPED", mode, status, left, flush=True)
  assert train(mode) == 0
  assert end(mode) == end("whole"), mode
  print("MENDED", mode, flush=True)
"""


def _may_mount():
  words = ("unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt")
  try:
    return subprocess.run(words, capture_output=True).returncode == 0
  except OSError:
    return False


def test_a_full_or_read_only_disk_stops_the_run_and_loses_nothing(tmp_path):
  """A quota everywhere; a full and a read-only one where mounting is allowed.

  The run stops with a message, and goes on to the same bits once it can.
  """
  modes, prefix = ["limit"], []
  if _may_mount():
    modes, prefix = ["limit", "full", "readonly"], ["unshare", "-rm"]
  done = subprocess.run(
    [*prefix, sys.executable, "-c", DISK, tmp_path, *modes],
    capture_output=True,
    text=True,
    env=ENVIRONMENT,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  for mode in modes:
    assert re.search(f"STOPPED {mode} 2 [46]", done.stdout), done.stdout
    assert f"MENDED {mode}" in done.stdout
  messages = re.findall(r"crcm: (.*)", done.stderr)
  assert len(messages) == len(modes)
  for mode, message in zip(modes, messages, strict=True):
    assert str(tmp_path / mode / "diffusion") in message
  assert "File too large" in messages[0]
  if len(modes) > 1:
    assert "No space left on device" in messages[1]
    assert "Read-only file system" in messages[2]


MESHES = textwrap.dedent("""
  import dataclasses, pathlib, sys
  import jax, numpy as np
  import tiny
  from crcm_jax.training import Checkpoints, _loop, sharding, step_arguments

  jax.config.update("jax_num_cpu_devices", 8)
  folder = pathlib.Path(sys.argv[1])
  rules = ((".*/kernel", (None, "fsdp")), (".*", ()))
  data = tiny.config()["data"] | dict(batch_size=8)
  make = lambda steps, **mesh: tiny.stage(
    steps=steps, mesh=mesh, sharding=rules, data=data
  )
  folders = _loop.Folders(folder / "run", folder)
  written = _loop.train_stage(make(4, data=8), folders)

  stage = make(4, fsdp=4, context=2)
  mesh = sharding.make_mesh(**stage.mesh)
  like = step_arguments(stage, mesh).state
  found = Checkpoints(folder / "run" / "diffusion").restore(like, stage.config)
  jax.tree.map(np.testing.assert_array_equal, found.state, written)
  split = 0
  for leaf, shape in zip(
    jax.tree.leaves(found.state), jax.tree.leaves(like), strict=True
  ):
    assert leaf.sharding == shape.sharding
    assert len(leaf.sharding.device_set) == 8
    split += not leaf.sharding.is_fully_replicated
  assert split > 20, split

  other = _loop.train_stage(make(8, data=2, fsdp=4), folders)
  same = _loop.train_stage(
    make(8, data=8), dataclasses.replace(folders, experiment=folder / "same")
  )
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
  jax.tree.map(close, other.student, same.student)
  print("SPLIT", split)
""")


def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
  assert "SPLIT" in run("-c", MESHES, tmp_path)
