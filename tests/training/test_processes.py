"""Several real processes on loopback, with gloo between them."""

import json
import os
import re

import jax
import numpy as np
import process_child
import processes
import pytest
import tiny

from crcm_jax import cli, training
from crcm_jax.training import _jax_distributed, _lock, _processes

CONFIG = str(processes.HERE / "process_config.py")


class Runs:
  """Runs of `crcm train` in a folder of a test."""

  def __init__(self, folder, data):
    self.folder, self.data = folder, data

  def words(self, name, stages, settings):
    return [
      *("--config", f"{CONFIG}:{stages}", "--workdir", self.folder / name),
      *("--data_dir", self.data),
      *(f"--config.{key}={value}" for key, value in settings.items()),
    ]

  def alone(self, name, stages="diffusion", **settings):
    """Trains in this process."""
    words = self.words(name, stages, _dotted(settings))
    with tiny.compile_fast():
      return cli.main(["train", *map(str, words)])

  def together(
    self, count, name, stages="diffusion", *, devices=1, mishap=("none", 0),
    own=(), **settings
  ):  # fmt: skip
    """Trains in so many processes; `own` holds settings of single ones."""
    port = processes.free_port()
    commands = [
      [
        *("process_child.py", *mishap),
        *self.words(name, stages, _dotted(settings)),
        *processes.by_hand(count, i, port=port),
        *(own[i] if own else ()),
      ]
      for i in range(count)
    ]
    return processes.run(commands, devices=devices)

  def losses(self, name, stage="diffusion"):
    """Returns the steps and losses that a run has written."""
    path = self.folder / name / stage / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    names = [key for key in rows[-1] if key.endswith("loss")]
    return {name: [row.get(name, np.nan) for row in rows] for name in names}

  def report(self, name):
    """Returns the scores of a run's report."""
    return json.loads((self.folder / name / "report.json").read_text())["rows"]

  def assert_same(self, name, expected, stage="diffusion", steps=6):
    """Asserts equal losses, to the rounding of sums in another order."""
    losses = self.losses(name, stage)
    assert losses.keys() == expected.keys()
    for key, values in losses.items():
      np.testing.assert_allclose(values, expected[key][:steps], rtol=1e-5)


def _dotted(settings):
  return {key.replace("__", "."): value for key, value in settings.items()}


@pytest.fixture
def runs(tmp_path, data_dir, restore_logging):
  return Runs(tmp_path, data_dir)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir):
  """The losses of a lone process that is never stopped."""
  runs = Runs(tmp_path_factory.mktemp("whole"), data_dir)
  assert runs.alone("whole") == 0
  return runs.losses("whole")


def test_two_processes_train_as_one_and_stop_together(runs, whole):
  """A signal to one; the other saves too, and a lone process goes on."""
  ended = runs.together(
    2, "run", mesh__data=2, mishap=("terminate", 1), diffusion__steps=5
  )
  assert [one.code for one in ended] == [0, 0]
  saved = r"was stopped and saved at step (\d)"  # which one: batches are early
  (step,) = {int(re.search(saved, one.output)[1]) for one in ended}
  checkpoint = runs.folder / "run" / "diffusion" / "checkpoints" / str(step)
  assert len(list(checkpoint.glob("state/ocdbt.process_*"))) == 2
  runs.assert_same("run", whole, steps=step)
  assert runs.alone("run") == 0
  runs.assert_same("run", whole)


def test_processes_that_disagree_all_say_so(tmp_path):
  port = processes.free_port()
  with _lock.holding(tmp_path / "run"):
    ended = processes.run(
      [
        (
          "process_checks.py",
          port,
          2,
          i,
          tmp_path / "run",
          tmp_path / f"run{i}",
        )
        for i in range(2)
      ],
      devices=2,
    )
  batch = list(range(8))
  assert f"MIXED: (0, 1, 4, 5) of {batch}" in ended[0].output
  assert f"MIXED: (2, 3, 6, 7) of {batch}" in ended[1].output
  for one in ended:
    assert one.code == 0
    assert "SAME: passed" in one.output
    assert f"SHARED: {tuple(batch)} of {batch}" in one.output
    assert re.search(
      rf"IN USE: OSError: `workdir` must be in use by one run alone; process"
      rf" {os.getpid()} on \S+ is training in '{tmp_path / 'run'}'. Stop it,",
      one.output,
    )
    assert re.search(
      r"CONFIG: ValueError: all processes must run the same config .* process 1"
      r" on \S+ \(config hash \w{12}\) differs from process 0 on \S+ \(\w{12}\)"
      r" in `loop.keep`: 2 -> 3, `seed`: 0 -> 1. Start all with the same",
      one.output,
    )
    assert re.search(
      r"WORKDIR: OSError: `workdir` must be one folder that all hosts share;"
      r" what process 0 wrote there is not seen by process 1 in '.*run1' on"
      r" \S+. Give a folder",
      one.output,
    )
    assert re.search(
      r"READ-ONLY: OSError: process 0 cannot write to `workdir`: .*proc",
      one.output,
    )
  assert not list(tmp_path.glob("*/.process-*"))


@pytest.mark.slow
def test_four_processes_then_two_then_one_on_other_meshes(runs, whole):
  for one in runs.together(4, "run", mesh__data=4, diffusion__steps=2):
    assert one.code == 0
  folder = runs.folder / "run" / "diffusion" / "checkpoints" / "2" / "state"
  assert len(list(folder.glob("ocdbt.process_*"))) == 4
  for one in runs.together(2, "run", mesh__fsdp=2, diffusion__steps=4):
    assert one.code == 0
  assert runs.alone("run") == 0
  runs.assert_same("run", whole)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_continued_by_four(runs, whole):
  assert runs.alone("run", diffusion__steps=3) == 0
  for one in runs.together(4, "run", mesh__data=2, mesh__fsdp=2):
    assert one.code == 0
  runs.assert_same("run", whole)


@pytest.mark.slow
def test_two_stages_with_two_devices_a_process(runs):
  """The second one loads networks that the first one left in parts."""
  stages = "diffusion,matching"
  assert runs.alone("whole", stages) == 0
  for one in runs.together(2, "run", stages, devices=2, mesh__fsdp=4):
    assert one.code == 0
  for stage in ("diffusion", "matching"):
    runs.assert_same("run", runs.losses("whole", stage), stage)
  assert {"student/loss", "critic/loss"} == set(runs.losses("run", "matching"))


@pytest.mark.slow
def test_processes_may_hold_the_same_examples(runs, whole):
  """Along `context` they do; then both read all of a batch."""
  ended = runs.together(
    2, "run", mesh__context=2, diffusion__steps=3, loop__sample_every=3
  )
  for one in ended:
    assert one.code == 0
  runs.assert_same("run", whole, steps=3)
  samples = runs.folder / "run" / "diffusion" / "samples"
  assert len(list(samples.glob("*.gif"))) == 4


@pytest.mark.slow
def test_a_stop_waits_until_the_checkpoint_is_whole(runs):
  """The others are done long before the first one has hashed its files."""
  for one in runs.together(
    2, "run", mesh__data=2, diffusion__steps=5,
    mishap=("terminate_and_hash_slowly", 1),
  ):  # fmt: skip
    assert one.code == 0
  checkpoints = runs.folder / "run" / "diffusion" / "checkpoints"
  newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert (checkpoints / str(newest) / "SHA256SUMS").exists()


@pytest.mark.slow
def test_a_signal_at_the_last_step_stops_all(runs):
  for one in runs.together(
    2, "run", mesh__data=2, diffusion__steps=3, mishap=("terminate", 0)
  ):
    assert one.code == 0
    assert "was stopped and saved at step" in one.output


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["fail", "cannot_write"])
def test_an_error_of_one_process_ends_all(runs, mishap):
  first, second = runs.together(2, "run", mesh__data=2, mishap=(mishap, 1))
  assert (first.code, second.code) == (1, 1)
  assert "OSError: [Errno 28] No space left on device" in second.output
  message = (
    r"crcm: stopped, for process 1 on \S+ failed: OSError: .* No space left"
  )
  assert re.search(message, first.output)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_the_other(runs, victim):
  ended = runs.together(2, "run", mesh__data=2, mishap=("kill", victim))
  dead, other = ended[victim], ended[1 - victim]
  assert dead.code == -9
  assert other.code not in (0, -9)
  assert other.seconds - dead.seconds < 60
  assert re.search(r"(?i)gloo|connection|another task died", other.output)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_process_ends_the_other_within_a_few_heartbeats(runs, victim):
  """And itself, as soon as it goes on: it does not train alone."""
  ended = runs.together(2, "run", mesh__data=2, mishap=("freeze", victim))
  frozen, other = ended[victim], ended[1 - victim]
  for one in ended:
    assert one.code not in (0, -9)
    assert "another task died" in one.output
  assert re.search(r"(?i)heartbeat", other.output)
  # It freezes before the third step, for four heartbeats.
  assert other.seconds < frozen.seconds - process_child.HEARTBEAT


@pytest.mark.slow
def test_a_process_that_hangs_is_waited_for(runs, whole):
  """It is alive, so its heartbeat goes on; it says what it waits for."""
  first, second = runs.together(2, "run", mesh__data=2, mishap=("hang", 1))
  assert (first.code, second.code) == (0, 0)
  assert "Waiting for data, for 20 s so far." in second.output
  runs.assert_same("run", whole)


@pytest.mark.slow
def test_the_first_process_alone_reports_what_a_lone_one_does(runs):
  assert runs.alone("alone", "causal") == 0
  first, second = runs.together(
    2, "run", "causal", mesh__data=2, mishap=("cannot_report", 1)
  )
  assert (first.code, second.code) == (0, 0)
  assert f"The report is {runs.folder / 'run' / 'report.html'}" in first.output
  assert "The report is" not in second.output
  expected, found = (runs.report(name) for name in ("alone", "run"))
  names = {"real", "causal, 2 steps", "causal, 1 step"}
  assert names == expected.keys() == found.keys()
  for name, row in expected.items():
    for metric in row.keys() - {"latency_ms", "frames_per_second"}:
      np.testing.assert_allclose(
        found[name][metric], row[metric], rtol=1e-5, err_msg=metric
      )


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_ends_all(runs, whole):
  """Process 0 found it whole, so it stays as it is."""
  assert runs.alone("run") == 0
  first, second = runs.together(
    2, "run", mesh__data=2, mishap=("cannot_read", 1)
  )
  assert (first.code, second.code) == (1, 1)
  assert re.search(
    r"ValueError: the checkpoint of step 6 .* is whole but cannot be read into"
    r" this run's state: .* Input/output error",
    second.output,
  )
  assert "crcm: stopped, for process 1 on" in first.output
  checkpoints = runs.folder / "run" / "diffusion" / "checkpoints"
  assert "6" in {folder.name for folder in checkpoints.iterdir()}
  assert runs.alone("run") == 0
  runs.assert_same("run", whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_all(runs, whole):
  assert runs.alone("run") == 0
  checkpoints = runs.folder / "run" / "diffusion" / "checkpoints"
  (checkpoints / "6" / "about" / "metadata").write_text("{")
  for one in runs.together(2, "run", mesh__data=2):
    assert one.code == 0
  assert (checkpoints / "6.damaged").is_dir()
  runs.assert_same("run", whole)


@pytest.mark.slow
def test_an_update_that_is_not_finite_stops_all(runs):
  ended = runs.together(
    2, "run", mesh__data=2, diffusion__optimizer__learning_rate=1e38
  )
  for one in ended:
    assert one.code == 2
    assert re.search(
      r"stopped at step \d: its update was not finite", one.output
    )


@pytest.mark.slow
def test_different_commands_are_an_error_for_all(runs):
  ended = runs.together(
    2, "run", "diffusion,matching", mesh__data=2,
    own=((), ("--stage", "diffusion")),
  )  # fmt: skip
  for one in ended:
    assert one.code == 2
    assert "in `--stage`: None -> 'diffusion'" in one.output


@pytest.mark.slow
def test_a_mesh_must_have_devices_of_every_process(runs):
  for one in runs.together(2, "run", mesh__devices=1):
    assert one.code == 2
    assert re.search(
      r"`mesh` must have devices of every process; .* none of processes \[1\]."
      r" Set `--config.mesh.data=2`",
      one.output,
    )


def test_alone_nothing_is_exchanged(monkeypatch, tmp_path):
  monkeypatch.setattr(_jax_distributed, "Store", None)
  _processes.initialize()
  _processes.initialize(num_processes=1)
  training.check_start({}, tmp_path / "new")
  assert _processes.gather({"a": 1}) == [{"a": 1}]
  assert not jax.distributed.is_initialized()
  assert not (tmp_path / "new").exists()
  with _processes.ending_together():
    pass


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (("h:1", 2, None), r"must be given together; got h:1, 2 and None"),
    ((None, 2, 0), r"must be given together; got None, 2 and 0"),
    (("h:1", None, None), r"must be given together; got h:1, None and None"),
    (("h:1", 2, 2), r"`--process-id` must lie in \[0, 2\).* got 2"),
    (("h:1", 2, -1), r"`--process-id` must lie in \[0, 2\).* got -1"),
    (("h", 2, 1), r"`--coordinator` must have the form HOST:PORT.* got 'h'"),
  ],
)
def test_arguments_must_fit_together(given, message):
  with pytest.raises(ValueError, match=message):
    _processes.initialize(*given)


def test_the_command_names_an_unreachable_coordinator(tmp_path, capsys):
  address = f"127.0.0.1:{processes.free_port()}"
  words = ["train", "--config", CONFIG, "--workdir", str(tmp_path / "run")]
  by_hand = ["--num-processes", "2", "--process-id", "1"]
  code = cli.main(
    [*words, "--coordinator", address, *by_hand, "--start-timeout", "0.5"]
  )
  assert code == 2
  error = capsys.readouterr().err
  assert f"crcm: the coordinator at {address} did not answer" in error
  assert not (tmp_path / "run").exists()


def test_a_cluster_that_jax_finds_is_used(monkeypatch):
  """SLURM's variables, as `srun` sets them in the second of two tasks."""
  slurm = dict(JOB_ID="5", STEP_NODELIST="node[7-8]", NTASKS="2", PROCID="1")
  for name, value in (slurm | dict(LOCALID="0")).items():
    monkeypatch.setenv(f"SLURM_{name}", value)
  calls = []
  monkeypatch.setattr(
    _processes._rendezvous, "meet", lambda *a: calls.append(a)
  )
  monkeypatch.setattr(
    _jax_distributed, "initialize", lambda *a: calls.append(a)
  )
  monkeypatch.setattr(_processes, "_check_devices", lambda count: None)
  _processes.initialize(timeout=7.0)
  (address, count, process, timeout), (cluster, *_) = calls
  assert re.fullmatch(r"node7:\d+", address)
  assert (count, process, timeout) == (2, 1, 7.0)
  assert cluster.local_device_ids == [0]


def test_a_cluster_that_jax_cannot_read_is_an_error(monkeypatch):
  def detect(timeout):
    raise RuntimeError("pod has no controller.")

  monkeypatch.setattr(_jax_distributed, "detect", detect)
  message = r"not clear: pod has no controller. Give `--num-processes 1` if"
  with pytest.raises(ValueError, match=message):
    _processes.initialize()
