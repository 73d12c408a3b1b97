import dataclasses
import json
import logging
import os
import re
import signal
import threading

import jax
import numpy as np
import pytest
import tiny

from crcm_jax.data import Reading
from crcm_jax.training import (
  _data,
  _experiment,
  _feed,
  _loop,
  _stages,
  _writers,
)
from crcm_jax.training._checkpoints import Checkpoints


@pytest.fixture(autouse=True)
def _compile_fast():
  with tiny.compile_fast():
    yield


@pytest.fixture
def folders(tmp_path):
  return _loop.Folders(tmp_path / "run", tmp_path / "data")


def lines(folders, stage="diffusion"):
  return (folders.experiment / stage / "metrics.jsonl").read_text()


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path, folders):
  other = _loop.Folders(tmp_path / "other", tmp_path / "data")
  whole = _loop.train_stage(tiny.stage(steps=5), folders)
  _loop.train_stage(tiny.stage(steps=3), other)
  resumed = _loop.train_stage(tiny.stage(steps=5), other)
  assert_same(whole, resumed)
  assert lines(folders) == lines(other)


def test_the_workdir_tells_all_about_the_run(folders):
  stage = tiny.stage(loop=dict(sample_every=4, keep=1, milestone_every=3))
  _loop.train_stage(stage, folders)
  workdir = folders.experiment / "diffusion"
  assert json.loads((workdir / "config.json").read_text()) == stage.config
  rows = [json.loads(line) for line in lines(folders).splitlines()]
  assert [row["step"] for row in rows] == [1, 2, 3, 4]
  assert {
    *("student/loss", "student/grad_norm", "student/skipped"),
    *("student/ema_decay", "student/learning_rate"),
  } <= set(rows[0])
  assert Checkpoints(workdir).steps() == [3, 4]
  assert len(list((workdir / "samples").glob("*_0000004.gif"))) == 2


def test_speed_and_samples_have_files_of_their_own(folders, caplog):
  stage = tiny.stage(loop=dict(sample_every=2))
  with caplog.at_level(logging.INFO, logger="crcm_jax"):
    _loop.train_stage(stage, folders)
  assert re.search(
    r"diffusion: 4 steps in .* tokens/s; lost .* s to samples", caplog.text
  )
  workdir = folders.experiment / "diffusion"
  speed = _writers.read_metrics(workdir / "speed.jsonl")
  assert [row["step"] for row in speed] == [1, 2, 3, 4]
  for row in speed:
    # Two videos of two frames of 2 x 2 latents, which are one token.
    assert row["tokens_per_second"] == pytest.approx(
      4 * row["steps_per_second"]
    )
    assert row["bad_records"] == 0
    lost = {f"{what}_seconds" for what in ("data", "checkpoints", "samples")}
    assert lost < set(row)
  # What a step's samples take is told by the line of the next step.
  assert [row["samples_seconds"] > 0 for row in speed] == [0, 0, 1, 0]
  samples = _writers.read_metrics(workdir / "samples.jsonl")
  assert [row["step"] for row in samples] == [2, 4]
  assert set(samples[0]) == {
    *("step", "mean/0", "std/0", "saturated/0", "drift/0"),
  }


@pytest.mark.skipif(
  not hasattr(_stages.Stage, "frozen_shapes"), reason="needs training.flops"
)
def test_utilisation_is_of_the_steps_necessary_operations(folders, monkeypatch):
  from crcm_jax.training import flops

  monkeypatch.setattr(_loop, "peak_flops", lambda kind: 1e6)
  stage = tiny.stage(steps=2)
  _loop.train_stage(stage, folders)
  workdir = folders.experiment / "diffusion"
  expected = flops.step(stage, "student").total / 1e6
  for row in _writers.read_metrics(workdir / "speed.jsonl"):
    used = row["model_flop_utilisation"] / row["steps_per_second"]
    assert used == pytest.approx(expected)


def test_a_checkpoint_holds_the_position_of_the_batch_used_last(folders):
  """And not of the one that was read ahead."""
  _loop.train_stage(tiny.stage(), folders)
  checkpoints = Checkpoints(folders.experiment / "diffusion")
  for step in (2, 4):
    assert checkpoints.read(step).data == {"position": step}
  checkpoints.close()


def test_the_loops_settings_reach_the_reader(folders):
  loop = dict(data_workers=2, max_bad_records=3)
  data = dict(name="moving_digits", batch_size=2, frames=3)
  config = tiny.config(loop=loop, data=data)
  stage = _experiment.read_experiment(config).stages["diffusion"]
  assert stage.dataset.reading == Reading(workers=2, max_bad=3)
  with pytest.raises(ValueError, match=r"`loop.data_workers` must be at"):
    tiny.stage(loop=dict(data_workers=-1))


@pytest.mark.slow
def test_worker_processes_change_nothing_that_is_computed(tmp_path):
  """Two real ones; a run goes on without them where they left it."""
  pytest.importorskip("tensorflow_datasets")
  network = tiny.config()["network"] | dict(
    in_channels=16, out_channels=16, text_width=32, text_length=8
  )
  settings = dict(
    network=network,
    data=dict(
      name="moving_digits", batch_size=2, frames=2, train_clips=8, test_clips=1
    ),
  )
  states = []
  for name, runs in (("alone", [(0, 4)]), ("helped", [(2, 2), (0, 4)])):
    folders = _loop.Folders(tmp_path / name, tmp_path / "data")
    for workers, steps in runs:
      loop = dict(checkpoint_every=2, tensorboard=False, data_workers=workers)
      config = tiny.config(**settings, loop=loop)
      config["diffusion"] = tiny.DIFFUSION | dict(steps=steps)
      stage = _experiment.read_experiment(config).stages["diffusion"]
      state = _loop.train_stage(stage, folders)
    states.append((state, lines(folders)))
  (alone, written), (helped, written_too) = states
  assert_same(alone, helped)
  assert written == written_too


def test_another_config_in_the_workdir_is_refused(folders):
  _loop.train_stage(tiny.stage(steps=2), folders)
  with pytest.raises(ValueError, match=r"differs in `optimizer.learning_rate`"):
    _loop.train_stage(
      tiny.stage(steps=2, optimizer=dict(learning_rate=1.0, warmup_steps=0)),
      folders,
    )


def test_stops_at_the_first_update_that_is_not_finite(folders):
  exploding = dict(learning_rate=1e38, warmup_steps=0)
  stage = tiny.stage(
    steps=9, optimizer=exploding, loop=dict(checkpoint_every=1)
  )
  message = (
    r"diffusion stopped at step (\d): its update was not finite"
    r" \(.*grad_norm.*loss.*\), and was not applied. Checkpoints of steps"
    r" \[1.*\] are kept. Lower the learning rate, or allow"
  )
  with pytest.raises(_loop.NonFiniteUpdate, match=message):
    _loop.train_stage(stage, folders)
  kept = Checkpoints(folders.experiment / "diffusion").read(None)
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(kept.state))


def test_a_config_may_allow_updates_that_are_not_finite(folders):
  exploding = dict(learning_rate=1e38, warmup_steps=0)
  stage = tiny.stage(optimizer=exploding, loop=dict(allow_skipped=9))
  state = _loop.train_stage(stage, folders)
  assert state.step == stage.steps
  assert state.skipped > 0


class _Killed:
  """Batches that ask the process to stop, once, at the second one.

  It is read while the first step runs, or just after.
  """

  def __init__(self, batches):
    self._batches, self._count = batches, 0

  def __next__(self):
    self._count += 1
    if self._count == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return next(self._batches)

  def __iter__(self):
    return self

  def get_state(self):
    return self._batches.get_state()

  def set_state(self, state):
    self._batches.set_state(state)


class _Stalled(_Killed):
  """Batches of which one does not come, as they ask to stop."""

  at = 3

  def __next__(self):
    self._count += 1
    if self._count == self.at:
      os.kill(os.getpid(), signal.SIGTERM)
      threading.Event().wait()
    return next(self._batches)


class _StalledAtOnce(_Stalled):
  at = 1


STOPS = {
  _Killed: r"and saved at step [12];",
  _Stalled: "and saved at step 2;",
  _StalledAtOnce: "before its first step;",
}


@pytest.mark.parametrize("kind", STOPS)
def test_sigterm_saves_and_the_same_command_goes_on(kind, folders, monkeypatch):
  stage = tiny.stage(loop=dict(checkpoint_every=4))
  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    batches = _data.RandomLatents.batches
    killed = lambda *arguments: kind(batches(*arguments))
    patch.setattr(_data.RandomLatents, "batches", killed)
    patch.setattr(_feed, "_PATIENCE", 0.1)
    with pytest.raises(_loop.Interrupted, match=STOPS[kind]) as error:
      _loop.train_stage(stage, folders)
  assert error.value.exit_status == 0
  assert signal.getsignal(signal.SIGTERM) is handler
  assert _loop.train_stage(stage, folders).step == stage.steps
  assert len(lines(folders).splitlines()) == stage.steps


def test_a_signal_after_the_last_step_is_not_lost(folders, monkeypatch):
  stage, save = tiny.stage(steps=2), _loop._Run.save

  def killed(run, step, *arguments):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    save(run, step, *arguments)

  monkeypatch.setattr(_loop._Run, "save", killed)
  with pytest.raises(_loop.Interrupted, match="saved at step 2"):
    _loop.train_stage(stage, folders)
  assert Checkpoints(folders.experiment / "diffusion").steps()[-1] == 2


@pytest.mark.parametrize(
  "name", ["jumps", "pairs", pytest.param("both", marks=pytest.mark.slow)]
)
def test_further_stages_train_and_sample(folders, name):
  """MeanFlow, ODE regression, and a joint stage, after a diffusion model."""
  stages = _experiment.read_experiment(
    tiny.config(
      stages=("diffusion", "jumps", "pairs", "both"),
      jumps=tiny.MEAN_FLOW,
      pairs=tiny.ODE_REGRESSION,
      both=tiny.JOINT | dict(steps=4),
    )
  ).stages
  _loop.train_stage(dataclasses.replace(stages["diffusion"], steps=1), folders)
  stage = stages[name]
  before = stage.init_state(folders.experiment).student
  state = _loop.train_stage(stage, folders)
  assert state.skipped == 0
  assert all(
    not np.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(before["head"]),
      jax.tree.leaves(state.student["head"]),
      strict=True,
    )
  )
  batch = next(stage.dataset.batches(folders.data, 0))
  clips = stage.sampler()(state.student, jax.random.key(0), batch, 2)
  assert clips.shape == batch.x_0.shape
  assert np.isfinite(clips).all()


def test_each_phase_is_compiled_once(folders, monkeypatch):
  stages = _experiment.read_experiment(
    tiny.config(
      stages=("diffusion", "matching"),
      matching=tiny.SELF_FORCING,
      loop=dict(checkpoint_every=9, tensorboard=False),
    )
  ).stages
  _loop.train_stage(stages["diffusion"], folders)
  programs, seen = [], []
  monitoring = jax.monitoring
  count = lambda name, seconds, **about: programs.append(name)
  monkeypatch.setattr(
    _loop._Run,
    "flush",
    lambda run: seen.append(
      sum("backend_compile" in name for name in programs)
    ),
  )
  monitoring.register_event_duration_secs_listener(count)
  try:
    state = _loop.train_stage(stages["matching"], folders)
  finally:
    monitoring.unregister_event_duration_listener(count)
  assert state.student_updates == 2
  assert state.fake_updates == 4
  # Before step 3 both phases, the student's and the critic's, ran once.
  after_both, *later = seen[2 : stages["matching"].steps]
  assert set(later) == {after_both}


def test_every_loop_setting_is_checked():
  with pytest.raises(ValueError, match=r"`loop.log_every` must be at least 1"):
    tiny.stage(loop=dict(log_every=0))
  with pytest.raises(ValueError, match=r"`loop.keep` must be at least 1"):
    tiny.stage(loop=dict(keep=0))
  for steps in (0, -3, "4", 2.5):
    with pytest.raises(ValueError, match=r"`config.diffusion.steps` must be"):
      tiny.stage(steps=steps)
  with pytest.raises(ValueError, match=r"`loop.milestone_every` must be at l"):
    tiny.stage(loop=dict(milestone_every=-1))
  assert dataclasses.replace(tiny.stage().loop, sample_every=0).is_due(
    "checkpoint", 4, 4
  )


@pytest.mark.parametrize(
  ("fails", "left"),
  [
    ((Checkpoints, "restore"), ["Checkpoints"]),
    ((_stages.Stage, "load_frozen"), ["Checkpoints"]),
    ((_writers, "TensorBoard"), ["Files", "Checkpoints"]),
    ((_stages.Stage, "train_steps"), ["TensorBoard", "Files", "Checkpoints"]),
    ((_loop, "Feed"), ["TensorBoard", "Files", "Checkpoints"]),
    (None, ["TensorBoard", "Files", "Checkpoints"]),
  ],
)
def test_what_was_opened_is_closed_once_however_it_ends(
  folders, monkeypatch, fails, left
):
  closed = []
  for kind in (Checkpoints, _writers.Files, _writers.TensorBoard):

    def close(self, usual=kind.close, name=kind.__name__):
      closed.append(name)
      usual(self)

    monkeypatch.setattr(kind, "close", close)

  def fail(*arguments, **settings):
    raise ValueError("on purpose")

  stage = tiny.stage(steps=1, loop=dict(tensorboard=True))
  if fails is None:
    _loop.train_stage(stage, folders)
  else:
    monkeypatch.setattr(*fails, fail)
    with pytest.raises(ValueError, match="on purpose"):
      _loop.train_stage(stage, folders)
  assert closed == left
