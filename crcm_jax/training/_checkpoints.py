"""Checkpoints: everything a run needs to go on as if it had never stopped.

One checkpoint holds the train state, the position in the data, the config and
the version of the code. Random keys need no room: a step derives its own from
the seed and its number. Orbax writes in the background to a temporary folder
and renames it, so that a folder with a number for a name is complete; one that
was damaged later is skipped for the one before it, and the reader is told.
"""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from crcm_jax._version import __version__
from crcm_jax.training import _config, _processes

_LOG = logging.getLogger(__name__)

RESUMABLE = ("loop", "mesh", "sharding", "steps")
"""Sections and keys that may change between a run and its continuation."""


class Restored(NamedTuple):
  """What a checkpoint holds.

  Attributes:
    step: iterations done.
    state: the train state.
    data: the position in the data, as JSON values.
    config: the config of the run that wrote it.
  """

  step: int
  state: Any
  data: Any
  config: dict[str, Any]


class Checkpoints:
  """The checkpoints of one stage, in `WORKDIR/checkpoints`."""

  def __init__(self, workdir: pathlib.Path | str, *, keep: int = 2):
    """Opens the checkpoints of `workdir`.

    Args:
      workdir: folder of the stage; made if it is missing.
      keep: how many of the newest checkpoints to keep.

    Raises:
      ValueError: if `keep` is less than 1.
    """
    if keep < 1:
      raise ValueError(f"`keep` must be at least 1; got {keep}.")
    self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
      item_handlers={
        "state": ocp.StandardCheckpointHandler(),
        "about": ocp.JsonCheckpointHandler(),
      },
    )

  def steps(self) -> list[int]:
    """Lists the iterations of which there is a checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self, step: int, state: Any, data: Any, config: Mapping[str, Any]
  ) -> None:
    """Starts writing a checkpoint; does nothing if this step has one.

    Args:
      step: iterations done.
      state: pytree of arrays; may be donated once this returns.
      data: the position in the data, as JSON values.
      config: the stage's config.
    """
    if step in self._manager.all_steps():
      return
    about = {
      "data": data,
      "config": _config.as_dict(config),
      "version": __version__,
    }
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
      ),
    )

  def restore(self, like: Any, config: Mapping[str, Any]) -> Restored | None:
    """Reads the newest checkpoint of this config that is whole.

    Args:
      like: pytree of arrays or `jax.ShapeDtypeStruct` with the shapes, dtypes
        and shardings to restore to.
      config: the config that is about to run.

    Returns:
      The checkpoint, or None if there is none.

    Raises:
      ValueError: if the workdir belongs to another config, naming the keys
        that differ, or if there are checkpoints but none can be read.
    """
    damaged: list[int] = []
    reason = ""
    for step in reversed(self.steps()):
      about, state, reason = {}, None, None
      try:
        about = self._about(step)
        _check_same(about["config"], config, self._folder.parent)
        state = self._state(step, like)
      except _Unreadable as error:
        reason = _first_line(error)
      # What one process cannot read is damaged for all.
      reason = next(filter(None, _processes.gather(reason)), None)
      if reason is None:
        self._set_aside(damaged)
        return Restored(step, state, about["data"], about["config"])
      damaged.append(step)
    if damaged:
      raise ValueError(
        f"`workdir` must hold a readable checkpoint; none of {damaged} in"
        f" {self._folder} can be read ({reason}). Remove the folder to start"
        " over."
      )
    return None

  def _set_aside(self, damaged: Sequence[int]) -> None:
    """Renames damaged checkpoints, so that the run can write them again."""
    for step in damaged if _processes.is_first_process() else ():
      aside = f"{step}.damaged"
      (self._folder / str(step)).rename(self._folder / aside)
      _LOG.warning(
        "The checkpoint of step %d in %s is damaged: it was renamed to %s, and"
        " the one before it is used.",
        *(step, self._folder, aside),
      )
    if damaged:
      _processes.wait_for_all()
      self._manager.reload()

  def read(self, step: int | None, like: Any = None) -> Restored:
    """Reads one checkpoint whatever its config, for another use.

    Args:
      step: iterations done, or None for the newest.
      like: as in `restore`; None restores plain dictionaries of NumPy arrays,
        the whole of them in each process.

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
      about = self._about(step)
      state = self._state(step, like)
    except _Unreadable as error:
      raise ValueError(
        f"the checkpoint of step {step} in {self._folder} is damaged"
        f" ({_first_line(error)}); name another one with `@STEP`, of {steps}."
      ) from error
    return Restored(step, state, about["data"], about["config"])

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()

  # The manager's own `restore` ends with all processes waiting for each other,
  # which one that cannot read never joins. A handler reads for one process.

  def _about(self, step: int) -> dict[str, Any]:
    folder = self._item(step, "about")
    try:
      return dict(ocp.JsonCheckpointHandler().restore(folder))
    except Exception as error:
      raise _Unreadable(str(error)) from error

  def _state(self, step: int, like: Any) -> Any:
    folder = self._item(step, "state")
    handler = ocp.StandardCheckpointHandler()
    try:
      if like is None:
        # Devices that wrote it may not be here: NumPy arrays need none.
        target = jax.tree.map(_host_array, handler.metadata(folder).tree)
      else:
        target = jax.tree.map(_shape_of, like)
      return handler.restore(folder, args=ocp.args.StandardRestore(target))
    # Orbax, TensorStore and the file system raise many kinds of errors for a
    # damaged file, and no common one.
    except Exception as error:
      raise _Unreadable(str(error)) from error

  def _item(self, step: int, name: str) -> Any:
    """Returns an item's folder; Orbax's name for the type is another one."""
    return self._folder / str(step) / name


class _Unreadable(Exception):
  """A checkpoint that is there, but cannot be read."""


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _host_array(leaf: Any) -> np.ndarray:
  """Returns an array of a leaf's shape and dtype that takes no memory."""
  return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _first_line(error: Exception) -> str:
  return str(error).strip().split("\n")[0][:200]


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
