"""Reads recorded reference numbers, one case at a time.

A golden file is an `.npz` whose array names start with the case they belong
to: `bell_c1-3/draw/eps`. `tests/golden/README.md` describes the files that
ship with this project; the loader knows nothing of their content beyond that
layout and the axis order of videos, `(B, C, T, H, W)`.

Example:
  >>> import pathlib
  >>> file = pathlib.Path("tests/golden/tf.npz")
  >>> case = load(file, "bell_c1-3")
  >>> case.config["loss_scale"], case.video("draw/eps").shape
  (100.0, (2, 7, 4, 6, 4))
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_CONFIG = "config"
_GRADIENT = "grad/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One case: its settings and its arrays, named without the case's name.

  Attributes:
    name: the case's name, "" for a file that is one single case.
    config: settings, empty where the file records none.
    arrays: every recorded array by name, in the reference's axis order.
  """

  name: str
  config: Mapping[str, Any]
  arrays: Mapping[str, np.ndarray]

  def __getitem__(self, name: str) -> np.ndarray:
    """Returns one array as it was recorded.

    Raises:
      KeyError: if the case has no such array, naming those it has.
    """
    if name not in self.arrays:
      known = ", ".join(n for n in self.arrays if not n.startswith(_GRADIENT))
      raise KeyError(f"`{self.name}` records no {name!r}; it has: {known}")
    return self.arrays[name]

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def video(self, name: str) -> np.ndarray:
    """Returns a recorded `(B, C, T, H, W)` video as `[b, f, h, w, c]`."""
    return np.moveaxis(self[name], 1, -1)

  def grads(self) -> dict[str, np.ndarray]:
    """Returns the recorded gradients by the reference's parameter names."""
    return _below(self.arrays, _GRADIENT)


def cases(path: str | os.PathLike) -> list[str]:
  """Returns the names of a file's cases in the order of their recording."""
  with np.load(path) as file:
    heads = (name.split("/")[0] for name in file.files if "/" in name)
    return list(dict.fromkeys(heads))


def load(path: str | os.PathLike, case: str = "") -> Case:
  """Reads one case, or a whole file as one case.

  Args:
    path: the `.npz` file.
    case: a name that `cases(path)` lists. The empty name loads every array
      of the file under its full name.

  Returns:
    The case. Its settings are its own, or else the file's.

  Raises:
    ValueError: if the file has no such case, naming those it has.
  """
  if case and case not in cases(path):
    known = ", ".join(cases(path))
    raise ValueError(f"`case` must be one of {path}'s: {known}; got {case!r}.")
  prefix = f"{case}/" if case else ""
  with np.load(path) as file:
    arrays = {n: file[n] for n in file.files if n.startswith(prefix)}
    arrays = _below(arrays, prefix)
    shared = file[_CONFIG] if _CONFIG in file.files else "{}"
  config = json.loads(str(arrays.pop(_CONFIG, shared)))
  return Case(name=case, config=config, arrays=arrays)


def _below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Returns the arrays whose names start with `prefix`, without it."""
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
