"""Checkpoints: everything a run needs to go on as if it had never stopped.

One checkpoint holds the train state (both networks, both optimizers' states,
the moving average, and the counters that tell the phase), the position in the
data, the metrics that the next line of the log repeats, the config, and the
versions of the code. Random keys need no room: a step derives its own from the
seed, which the config has, and its number, which the state has.

Orbax writes in the background to a temporary folder and renames it. Still in
the background, one process lists the files with their hashes (`_manifest`), and
only then are older checkpoints removed. So whatever is cut off at any moment, a
checkpoint with a list is complete, and there is one as soon as there was one.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from crcm_jax.training import _config, _manifest, _processes
from crcm_jax.training._versions import versions

_LOG = logging.getLogger(__name__)

RESUMABLE = ("loop", "mesh", "sharding", "steps")
"""Sections and keys that may change between a run and its continuation."""


class NotSaved(OSError):
  """A checkpoint could not be written; those before it are as they were."""


class Restored(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    step: iterations done.
    state: the train state.
    data: the position in the data, as JSON values.
    config: the config of the run that wrote it.
    metrics: each metric's last value, by name.
    versions: of the code and the libraries that wrote it.
  """

  step: int
  state: Any
  data: Any
  config: dict[str, Any]
  metrics: dict[str, float]
  versions: dict[str, str]


class Checkpoints:
  """The checkpoints of one stage, in `WORKDIR/checkpoints`."""

  def __init__(
    self,
    workdir: pathlib.Path | str,
    *,
    keep: int = 2,
    milestone_every: int = 0,
  ):
    """Opens the checkpoints of `workdir`.

    Args:
      workdir: folder of the stage; made if it is missing.
      keep: how many of the newest checkpoints to keep.
      milestone_every: those of each so many iterations are kept for ever; 0
        is for none.

    Raises:
      ValueError: if `keep` is less than 1, or `milestone_every` than 0.
    """
    if keep < 1:
      raise ValueError(f"`keep` must be at least 1; got {keep}.")
    if milestone_every < 0:
      raise ValueError(
        f"`milestone_every` must be at least 0; got {milestone_every}."
      )
    self._keep, self._milestone_every = keep, milestone_every
    self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self._folder,
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
      },
    )
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._saving: tuple[int, concurrent.futures.Future[None]] | None = None
    self._failed = False

  def steps(self) -> list[int]:
    """Lists the iterations of which there is a checkpoint, oldest first."""
    return _steps(self._folder)

  def save(
    self,
    step: int,
    state: Any,
    data: Any,
    config: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing a checkpoint; does nothing if this step has one.

    Args:
      step: iterations done.
      state: pytree of arrays; may be donated once this returns.
      data: the position in the data, as JSON values.
      config: the stage's config.
      metrics: each metric's last value, by name.

    Raises:
      NotSaved: if this checkpoint or the one before it cannot be written.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    about = {
      "data": data,
      "config": _config.as_dict(config),
      "metrics": dict(metrics or {}),
      "versions": versions(),
    }
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
    )
    try:
      self._manager.save(step, args=args)
    except Exception as error:
      raise self._not_saved(step, error) from error
    self._saving = step, self._thread.submit(self._finish, step)

  def check(self) -> None:
    """Raises `NotSaved` if the last checkpoint could not be written."""
    if self._saving is not None and self._saving[1].done():
      self.wait()

  def wait(self) -> None:
    """Waits until everything is written.

    Raises:
      NotSaved: if it could not be.
    """
    if self._saving is None:
      return
    step, future = self._saving
    self._saving = None
    try:
      future.result()
    # Orbax, TensorStore and the file system raise many kinds of errors for a
    # disk that is full, and no common one.
    except Exception as error:
      raise self._not_saved(step, error) from error

  def restore(self, like: Any, config: Mapping[str, Any]) -> Restored | None:
    """Reads the newest checkpoint of this config that is whole.

    For the run that goes on here: it also clears away what an earlier one left
    half-written.

    Args:
      like: pytree of arrays or `jax.ShapeDtypeStruct` with the shapes, dtypes
        and shardings to restore to.
      config: the config that is about to run.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if the workdir belongs to another config, naming the keys
        that differ; if there are checkpoints but all are damaged; or if a
        whole one does not fit `like`.
    """
    whole, damaged = self._agree_on_newest_whole()
    if whole is None and damaged:
      raise ValueError(
        f"`workdir` must hold a whole checkpoint; those of steps"
        f" {[step for step, _ in damaged]} in {self._folder} are all damaged"
        f" ({damaged[0][1]}). Remove the folder to start over."
      )
    if whole is None:
      self._clear_unfinished()
      return None
    about = _read_about(self._folder, whole)
    _check_same(about["config"], config, self._folder.parent)
    self._clear_unfinished()  # not before: it may be another config's run
    read = functools.partial(_read_state_like, like)
    restored = self._restored(whole, about, read)
    if _processes.is_first_process():
      for step, reason in damaged:
        self._set_aside(step, "damaged", reason)
    if damaged:
      _processes.wait_for_all()
      self._manager.reload()
    if restored.versions != versions():
      _LOG.warning(
        "The checkpoint of step %d was written by %s, and this is %s: the run"
        " goes on, but perhaps not to the same bits.",
        *(whole, restored.versions, versions()),
      )
    return restored

  def read(self, step: int | None, only: str | None = None) -> Restored:
    """Reads one checkpoint whatever its config, for another use.

    Its state comes as plain dictionaries of NumPy arrays.

    Args:
      step: iterations done, or None for the newest.
      only: the part of the state to read, such as "ema"; the others take no
        memory. None reads all.

    Raises:
      ValueError: if there is no such checkpoint, or it is damaged.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      raise ValueError(
        f"there is no checkpoint {'' if step is None else f'of step {step} '}"
        f"in {self._folder}; it has those of steps {steps}."
      )
    step = steps[-1] if step is None else step
    try:
      _manifest.check(self._folder / str(step))
    except _manifest.Damaged as error:
      raise ValueError(
        f"the checkpoint of step {step} in {self._folder} is damaged"
        f" ({error}); name another one with `@STEP`, of {steps}."
      ) from error
    about = _read_about(self._folder, step)
    return self._restored(step, about, functools.partial(_read_state, only))

  def close(self) -> None:
    """Waits until everything is written.

    Raises:
      NotSaved: if it could not be.
    """
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      # A failure was told as `NotSaved`; the manager would tell it again.
      known = (Exception,) if self._failed else ()
      with contextlib.suppress(*known):
        self._manager.close()

  def _finish(self, step: int) -> None:
    """Waits for Orbax, lists the files, and removes old checkpoints.

    On all processes it is over when it is on the first one: a process that
    ends earlier would take that one along, amid its work.
    """
    try:
      self._manager.wait_until_finished()
      if _processes.is_first_process():
        _manifest.write(self._folder / str(step))
        for old in self.steps()[: -self._keep]:
          if not self._is_milestone(old):
            self._remove(self._folder / str(old))
    finally:
      _processes.meet(f"saved/{next(_SAVES)}")

  def _is_milestone(self, step: int) -> bool:
    return self._milestone_every > 0 and step % self._milestone_every == 0

  def _remove(self, folder: pathlib.Path) -> None:
    """Removes a checkpoint; at no moment is there half of one."""
    shutil.rmtree(folder.rename(folder.with_suffix(_REMOVED)))

  def _not_saved(self, step: int, error: Exception) -> NotSaved:
    self._failed = True
    return NotSaved(
      f"the checkpoint of step {step} could not be written to {self._folder}"
      f" ({_first_line(error)}); those of steps {self.steps()} are as they"
      " were. See that there is room and that the folder may be written to: the"
      " same command goes on from there."
    )

  def _clear_unfinished(self) -> None:
    """Clears away what a run left that was cut off while it wrote."""
    if _processes.is_first_process():
      self._remove_unfinished()
    _processes.wait_for_all()
    self._manager.reload()

  def _remove_unfinished(self) -> None:
    for suffix in (ocp.utils.TMP_DIR_SUFFIX, _REMOVED):
      for folder in self._folder.glob(f"*{suffix}"):
        shutil.rmtree(folder)
    for folder in _written(self._folder):
      if not _manifest.is_in(folder):
        self._set_aside(
          int(folder.name), "unfinished", f"it has no {_manifest.NAME}"
        )

  def _agree_on_newest_whole(self) -> tuple[int | None, list[Any]]:
    """Looks in the first process, and tells the others."""
    first = _processes.is_first_process()
    found = self._newest_whole() if first else None
    return _processes.gather(found)[0]

  def _newest_whole(self) -> tuple[int | None, list[tuple[int, str]]]:
    """Returns the newest whole one, and what is wrong with those after it."""
    damaged: list[tuple[int, str]] = []
    for step in reversed(self.steps()):
      try:
        _manifest.check(self._folder / str(step))
        return step, damaged
      except _manifest.Damaged as error:
        damaged.append((step, str(error)))
      except OSError as error:
        raise OSError(
          error.errno,
          f"{error.strerror}: the checkpoint of step {step} cannot be read."
          " Mend the disk, or remove that folder to go on from the one before"
          " it",
          str(self._folder / str(step)),
        ) from error
    return None, damaged

  def _set_aside(self, step: int, what: str, reason: str) -> None:
    """Renames a checkpoint, so that the run can write it again."""
    folder = self._folder / str(step)
    aside = folder.with_suffix(f".{what}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    _LOG.warning(
      "The checkpoint of step %d in %s is %s (%s): it was renamed to %s, and"
      " the run goes on from the newest that is whole, or else begins anew.",
      *(step, self._folder, what, reason, aside.name),
    )

  def _restored(
    self, step: int, about: Any, read: Callable[[Any], Any]
  ) -> Restored:
    try:
      state = read(self._folder / str(step) / "state")
    except Exception as error:
      raise ValueError(
        f"the checkpoint of step {step} in {self._folder}, written by"
        f" {about['versions']}, is whole but cannot be read into this run's"
        f" state: {_first_line(error)}. Use the code that wrote it."
      ) from error
    return Restored(step, state, **about)


_REMOVED = ".removed"
_SAVES = itertools.count()  # all processes save equally often


def check_config(
  workdir: pathlib.Path | str, config: Mapping[str, Any]
) -> None:
  """Raises if a folder's newest checkpoint is of another config.

  Args:
    workdir: folder of the stage; nothing is written to it.
    config: the config that is about to run.

  Raises:
    ValueError: naming the keys that differ.
  """
  workdir = pathlib.Path(workdir).absolute()
  steps = _steps(workdir / "checkpoints")
  if not steps:
    return
  try:
    old = _read_about(workdir / "checkpoints", steps[-1])["config"]
  except Exception:  # It is damaged, which `restore` finds out and reports.
    return
  _check_same(old, config, workdir)


# The manager's own `restore` ends with all processes waiting for each other,
# which one that cannot read never joins. Handlers read for one process.


def _read_about(folder: pathlib.Path, step: int) -> dict[str, Any]:
  """Reads what a checkpoint says of itself, from the folder of them all."""
  about: Any = folder / str(step) / "about"
  return dict(ocp.JsonCheckpointHandler().restore(about))


def _read_state_like(like: Any, folder: Any) -> Any:
  args = ocp.args.StandardRestore(jax.tree.map(_shape_of, like))
  return ocp.StandardCheckpointHandler().restore(folder, args=args)


def _read_state(only: str | None, folder: Any) -> Any:
  """Reads a state or one part; devices that wrote it may not be here."""
  tree: Any = ocp.StandardCheckpointHandler().metadata(folder).tree
  tree = tree if only is None else {only: tree[only]}
  target = jax.tree.map(_host_array, tree)
  args = ocp.args.PyTreeRestore(
    target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=True,
  )
  return ocp.PyTreeCheckpointHandler().restore(folder, args=args)


def _written(folder: pathlib.Path) -> list[pathlib.Path]:
  """Lists the checkpoints that Orbax has finished."""
  return [p for p in folder.glob("[0-9]*") if p.name.isdecimal()]


def _steps(folder: pathlib.Path) -> list[int]:
  """Lists the iterations of which there is a whole checkpoint."""
  return sorted(int(p.name) for p in _written(folder) if _manifest.is_in(p))


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _host_array(leaf: Any) -> np.ndarray:
  """Returns an array of a leaf's shape and dtype that takes no memory."""
  return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _first_line(error: Exception) -> str:
  return str(error).strip().split("\n")[0][:1000]


def _check_same(
  old: Mapping[str, Any], new: Mapping[str, Any], workdir: pathlib.Path
) -> None:
  """Refuses to continue another config's run."""
  kept = [
    {key: value for key, value in config.items() if key not in RESUMABLE}
    for config in (old, new)
  ]
  if changed := _config.differences(*kept):
    raise ValueError(
      f"`workdir` {str(workdir)!r} holds a checkpoint of another config, which"
      f" differs in {', '.join(changed)}. Choose another `--workdir`, or give"
      " the old values."
    )
