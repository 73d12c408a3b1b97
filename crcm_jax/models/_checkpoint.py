"""Parameters in one safetensors file, flat, with their metadata.

Names are the tree's keys joined by "/". A file is written beside its place and
moved there when complete, so that a crash never leaves half a file.
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Params
from crcm_jax.models._about import check_about, METADATA
from crcm_jax.models._tensor_files import in_memory, open_tensors, write_tensors


def save_params(
  path: str | os.PathLike[str],
  params: Params,
  metadata: Mapping[str, Any],
  *,
  dtype: Any = None,
) -> None:
  """Writes parameters and what describes them.

  Args:
    path: the file, `*.safetensors`.
    params: a tree of dicts of arrays.
    metadata: anything JSON can hold: the config, the schedule, the command.
    dtype: dtype to store, `jnp.bfloat16` halves the file; None keeps it.
  """
  cast = lambda a: jnp.asarray(a, dtype or jnp.asarray(a).dtype)
  flat = {name: cast(value) for name, value in flatten(params).items()}
  about = {METADATA: json.dumps(dict(metadata))}
  write_tensors(pathlib.Path(path), in_memory(flat).tensors, about)


def load_params(
  path: str | os.PathLike[str],
  *,
  dtype: Any = None,
  expect: Mapping[str, Any] | None = None,
) -> tuple[Params, dict[str, Any]]:
  """Reads what `save_params` wrote.

  Args:
    path: the file.
    dtype: dtype of the parameters; None keeps the stored one.
    expect: entries of the metadata that the file must agree with where it has
      them, such as `{"pattern": {"first": 1, "rest": 3}}`.

  Returns:
    The parameters, and their metadata.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not whole, not one of `save_params`, or
      contradicts `expect`.
  """
  return _read(path, expect, lambda a: jnp.asarray(a, dtype or a.dtype))


def read_params(
  path: str | os.PathLike[str], *, expect: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads what `save_params` wrote into NumPy arrays: no device holds it.

  Args:
    path: the file.
    expect: as for `load_params`.

  Returns:
    The parameters in the stored dtype, and their metadata.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: as `load_params`.
  """
  return _read(path, expect, lambda a: a)


def _read(
  path: str | os.PathLike[str],
  expect: Mapping[str, Any] | None,
  cast: Callable[[Any], Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads one tensor after another, each cast before the next."""
  file = open_tensors(pathlib.Path(path))
  if METADATA not in file.metadata:
    raise ValueError(
      f"`path` must be a file written by `save_params`; {path} lacks its"
      " metadata. Convert an original Wan checkpoint with `params_from_torch`."
    )
  about = json.loads(file.metadata[METADATA])
  check_about(about, expect)
  flat = {name: cast(tensor.read()) for name, tensor in file.tensors.items()}
  return unflatten(flat), about


def flatten(params: Params) -> dict[str, Any]:
  """Joins the keys of a tree of dicts by "/"."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {
    "/".join(str(key.key) for key in path): value for path, value in leaves
  }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Inverts `flatten`."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *folders, name = path.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[name] = value
  return tree
