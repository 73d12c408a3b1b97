"""The training loop of one stage, from top to bottom.

Mesh, data, parameters, state, step functions, restore, loop. What it does at a
step follows from the config, the state and the data position alone, so a
resumed run is the run that never stopped.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from crcm_jax import evaluation
from crcm_jax.training import (
  _agreement,
  _lock,
  _processes,
  _writers,
  sharding,
)
from crcm_jax.training._arguments import step_arguments, StepArguments
from crcm_jax.training._checkpoints import check_config, Checkpoints
from crcm_jax.training._config import config_hash
from crcm_jax.training._feed import Feed, Stopped
from crcm_jax.training._speed import Meter, peak_flops, tokens_of
from crcm_jax.training._stages import Phase, Stage
from crcm_jax.training._state import TrainState
from crcm_jax.training._step import read_scalars

_LOG = logging.getLogger(__name__)

CLIPS = 4  # sample videos of one step


class NonFiniteUpdate(FloatingPointError):
  """An update was not finite; the last good checkpoint is kept."""


class Interrupted(BaseException):
  """The run was asked to stop, and saved a checkpoint first.

  Like `KeyboardInterrupt` it is no `Exception`: it may come at any moment, and
  whoever handles errors of a file or a record must not take it for one.

  Attributes:
    exit_status: what the command shall end with: 130 after SIGINT, 0 after
      SIGTERM, with which schedulers ask.
  """

  def __init__(self, message: str, number: int):
    super().__init__(message)
    self.exit_status = 128 + number if number == signal.SIGINT else 0


@dataclasses.dataclass(frozen=True)
class Folders:
  """Where a run reads and writes.

  Attributes:
    experiment: holds a workdir for each stage.
    data: holds the datasets.
  """

  experiment: pathlib.Path
  data: pathlib.Path


def train_stage(stage: Stage, folders: Folders) -> TrainState:
  """Trains one stage to its last step, from where its workdir stands.

  Args:
    stage: what to train.
    folders: where; the stage's workdir is the subfolder of its name.

  Returns:
    The state after the last step; its checkpoint is written.

  Raises:
    ValueError: if the workdir belongs to another config, or the processes run
      different ones.
    OSError: if the processes do not share the workdir, or another run is in it.
    NonFiniteUpdate: at the first update that is not finite, unless
      `config.loop.allow_skipped` allows it.
    Interrupted: after SIGTERM or SIGINT, with a checkpoint saved.
    OSError: if a checkpoint or a line of metrics cannot be written; the
      checkpoints before it stay as they are.
  """
  workdir = folders.experiment / stage.name
  _agreement.check_start(stage.config, workdir)
  mesh = sharding.make_mesh(**stage.mesh)
  stage = stage.on(mesh)
  with _lock.holding(workdir), contextlib.ExitStack() as opened:
    return _train(stage, folders, mesh, opened)


def _train(
  stage: Stage,
  folders: Folders,
  mesh: jax.sharding.Mesh,
  opened: contextlib.ExitStack,
) -> TrainState:
  """Trains a stage; `opened` closes what is open where it cannot begin."""
  workdir, loop = folders.experiment / stage.name, stage.loop
  checkpoints = Checkpoints(
    workdir, keep=loop.keep, milestone_every=loop.milestone_every
  )
  opened.enter_context(contextlib.closing(checkpoints))
  rows = sharding.local_rows(mesh, stage.dataset.shapes().x_0.shape[0])
  batches = stage.dataset.batches(folders.data, stage.seed, rows)

  given = step_arguments(stage, mesh)
  where = given.shardings()
  restored = checkpoints.restore(given.state, stage.config)
  if restored is None:
    state, latest = stage.init_state(folders.experiment, where.state), {}
  else:
    state, latest = restored.state, restored.metrics
    batches.set_state(restored.data)
    _LOG.info("%s goes on from step %d.", stage.name, restored.step)
  frozen = stage.load_frozen(folders.experiment, where.frozen)

  first = int(state.step)
  _describe(stage, workdir, given)
  writer = _open_writers(stage, workdir, first, opened)
  meter = _meter(stage, mesh)
  run = _Run(stage, checkpoints, writer, latest, meter)
  steps = stage.train_steps(where)
  key = stage.run_key()
  place = functools.partial(sharding.place_batch, mesh=mesh)
  with (
    _stop_signal() as asked,  # also while the last checkpoint is written
    opened.pop_all(),
    run.ending(),
    _bar(stage, first) as bar,
    Feed(batches, place, meter, bar.set_postfix_str, asked.of_one) as feed,
  ):
    stop = _processes.AnyProcess(asked)
    for step in range(first + 1, stage.steps + 1):
      phase = stage.phase(step - 1)
      try:
        batch = next(feed)
      except Stopped:
        if step - 1 > first:
          run.save(step - 1, state, feed.get_state())
        break
      state, metrics = steps[phase](state, frozen, batch, key)
      meter.started(metrics)
      run.report(bar, step, phase, metrics)
      stopping = stop.is_set(now=step == stage.steps)
      # Before the step is saved, after which a resumed run would not make
      # them; a run that has to stop has no time for them.
      if loop.is_due("sample", step, stage.steps) and not stopping:
        run.sample(step, state.ema, batch)
      if stopping or stage.is_saved(step):
        run.save(step, state, feed.get_state())
      if stopping:
        break
  # Whichever process was asked, and be it after the last step, all stop.
  if number := max(_processes.gather(asked.number)):
    done = int(state.step)
    where = f"and saved at step {done}" if done else "before its first step"
    raise Interrupted(
      f"{stage.name} was stopped {where}; the same command goes on from there.",
      number,
    )
  return state


def check_stage(stage: Stage, folders: Folders) -> None:
  """Raises where `train_stage` would, before anything is computed or written.

  Args:
    stage: what shall be trained.
    folders: where.

  Raises:
    ValueError: if the mesh does not fit the devices, the stage or the sharding
      rules, or if the workdir belongs to another config.
  """
  mesh = sharding.make_mesh(**stage.mesh)
  given = step_arguments(stage.on(mesh), mesh)
  sharding.local_rows(mesh, given.batch.x_0.shape[0])
  check_config(folders.experiment / stage.name, stage.config)


class _Run:
  """What is written about a run, one step behind the device's work."""

  def __init__(
    self,
    stage: Stage,
    checkpoints: Checkpoints,
    writer: _writers.Writer,
    latest: Mapping[str, float],
    meter: Meter,
  ):
    self._stage, self._checkpoints, self._writer = stage, checkpoints, writer
    self._pending: tuple[int, Phase, Mapping[str, Any]] | None = None
    # One line shows both phases: each metric as its phase left it.
    self._latest = dict(latest)
    self._meter, self._speed = meter, {}
    self._sampler = None

  def report(
    self, bar: Any, step: int, phase: Phase, metrics: Mapping[str, Any]
  ) -> None:
    """Takes a step's metrics; reads those of the step before.

    Reading waits for the device. One step later it need not wait.
    """
    self._checkpoints.check()
    self.flush()
    self._pending = step, phase, metrics
    shown = {k: f"{v:.4g}" for k, v in self._latest.items() if "loss" in k}
    if "tokens_per_second" in self._speed:
      shown["tokens/s"] = f"{self._speed['tokens_per_second']:.3g}"
    bar.set_postfix(shown, refresh=False)
    bar.update(1)

  def flush(self) -> None:
    """Reads and writes the pending metrics, and checks that they are finite.

    Raises:
      NonFiniteUpdate: if they are not, and the config does not allow it.
    """
    if self._pending is None:
      return
    step, phase, metrics = self._pending
    self._pending = None
    values = read_scalars(metrics)
    self._meter.finished(phase)
    self._check_finite(step, values)
    self._latest |= {f"{phase}/{name}": v for name, v in values.items()}
    if self._stage.loop.is_due("log", step, self._stage.steps):
      self._speed = self._meter.read()
      self._writer.scalars(step, self._latest)
      self._writer.scalars(step, self._speed, "speed")

  def save(self, step: int, state: TrainState, data: Any) -> None:
    """Starts writing a checkpoint of a step whose metrics are finite."""
    self.flush()
    with self._meter.losing("checkpoints"):
      self._checkpoints.save(
        step, state, data, self._stage.config, self._latest
      )

  def sample(self, step: int, params: Any, batch: Any) -> None:
    """Writes a few clips of the moving average, for the batch's captions."""
    self.flush()
    with self._meter.losing("samples"):
      self._sample(step, params, batch)

  def _sample(self, step: int, params: Any, batch: Any) -> None:
    if self._sampler is None:
      self._sampler = self._stage.sampler()
    few = jax.tree.map(lambda a: a[:CLIPS], batch)
    latents = sharding.fetch(self._sampler(params, jax.random.key(0), few))
    videos = np.asarray(self._stage.dataset.decode(latents))
    names = [f"clip{i}" for i in range(len(videos))]
    self._writer.videos(step, dict(zip(names, videos, strict=True)))
    self._writer.scalars(step, _statistics(self._stage, videos), "samples")

  @contextlib.contextmanager
  def ending(self) -> Iterator[None]:
    """Reads the last metrics at the end, unless it is an error."""
    yield
    self.flush()
    _LOG.info("%s: %s.", self._stage.name, self._meter.summary())

  def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
    if values["skipped"] <= self._stage.loop.allow_skipped:
      return
    names = [name for name, v in values.items() if not math.isfinite(v)]
    self._checkpoints.wait()
    saved = self._checkpoints.steps()
    raise NonFiniteUpdate(
      f"{self._stage.name} stopped at step {step}: its update was not finite"
      f" ({', '.join(names)}), and was not applied. Checkpoints of steps"
      f" {saved} are kept. Lower the learning rate, or allow some such updates"
      " with `--config.loop.allow_skipped=N`."
    )


def _describe(
  stage: Stage, workdir: pathlib.Path, given: StepArguments
) -> None:
  """Keeps the resolved config in the workdir, and says what is trained."""
  path = workdir / "config.json"
  if _processes.is_first_process():
    path.write_text(json.dumps(stage.config, indent=2) + "\n")
  parameters = sum(p.size for p in jax.tree.leaves(given.state.student))
  # Paths in the state and of the networks beside it are what the rules match.
  arrays = vars(given.state) | given.frozen
  _LOG.info(
    "%s: %d parameters; config in %s, hash %s; %s",
    *(stage.name, parameters, path, config_hash(stage.config)),
    sharding.describe(arrays, stage.rules, stage.model.place),
  )


def _open_writers(
  stage: Stage, workdir: pathlib.Path, first: int, opened: contextlib.ExitStack
) -> _writers.Writer:
  """Returns what process 0 writes to, which `opened` closes."""
  makers: list[Any] = []
  if _processes.is_first_process():
    makers.append(_writers.Files)
    if stage.loop.tensorboard:
      makers.append(_writers.TensorBoard)
  return _writers.Fanout(
    [
      opened.enter_context(contextlib.closing(make(workdir, from_step=first)))
      for make in makers
    ]
  )


def _meter(stage: Stage, mesh: Any) -> Meter:
  """Returns what counts a stage's speed."""
  latents = stage.dataset.shapes().x_0.shape
  return Meter(
    examples=latents[0],
    tokens=tokens_of(latents, stage.model.config.patch),
    flops=functools.partial(_necessary_flops, stage),
    devices=mesh.size,
    peak=peak_flops(mesh.devices.flat[0].device_kind),
  )


def _necessary_flops(stage: Stage, phase: Phase) -> float:
  from crcm_jax.training import flops  # traces the step: only where it is shown

  return flops.step(stage, phase).total


def _statistics(stage: Stage, videos: np.ndarray) -> dict[str, float]:
  """Returns the means over some clips of their chunks' statistics."""
  frames = videos.shape[1]
  spans = stage.pattern.spans(frames) if stage.pattern else ((0, frames),)
  measured = evaluation.chunk_statistics(videos, spans)
  return {
    f"{name}/{i}": float(value)
    for name, values in measured._asdict().items()
    for i, value in enumerate(values.mean(axis=0))
  }


def _bar(stage: Stage, first: int) -> Any:
  """Shows stage, step, loss and time left; a line a minute in a log file."""
  live = sys.stderr.isatty()
  return tqdm.tqdm(
    total=stage.steps,
    initial=first,
    desc=stage.name,
    unit="step",
    mininterval=0.5 if live else 30.0,
    dynamic_ncols=live,
    disable=not _processes.is_first_process(),
  )


class _Stop(threading.Event):
  """Set once a signal, of this number, has asked to stop."""

  number = 0

  def of_one(self) -> bool:
    """Whether it is set, and there are no other processes to agree with."""
    return self.is_set() and jax.process_count() == 1


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
  """Notes the first SIGTERM or SIGINT; a second one acts."""
  stop = _Stop()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  old = {}

  def ask(number: int, frame: Any) -> None:
    del frame
    stop.number = number
    stop.set()
    for each, handler in old.items():
      signal.signal(each, handler)

  for number in (signal.SIGTERM, signal.SIGINT):
    old[number] = signal.signal(number, ask)
  try:
    yield stop
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)
