"""Parameters in one safetensors file, flat, with their metadata.

Names are the tree's keys joined by "/". A file is written beside its place and
moved there when complete, so that a crash never leaves half a file.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

from crcm_jax._typing import Params

_METADATA = "crcm_jax"


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
  path = pathlib.Path(path)
  cast = lambda a: jnp.asarray(a, dtype or jnp.asarray(a).dtype)
  flat = {name: cast(value) for name, value in flatten(params).items()}
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    safetensors.flax.save_file(
      flat, part, metadata={_METADATA: json.dumps(dict(metadata))}
    )
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)


def load_params(
  path: str | os.PathLike[str], *, dtype: Any = None
) -> tuple[Params, dict[str, Any]]:
  """Reads what `save_params` wrote.

  Args:
    path: the file.
    dtype: dtype of the parameters; None keeps the stored one.

  Returns:
    The parameters, and their metadata.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not whole, or not one of `save_params`.
  """
  tensors, metadata = read_tensors(pathlib.Path(path))
  if _METADATA not in metadata:
    raise ValueError(
      f"`path` must be a file written by `save_params`; {path} lacks its"
      " metadata. Convert an original Wan checkpoint with `params_from_torch`."
    )
  cast = lambda a: jnp.asarray(a, dtype or a.dtype)
  params = unflatten({name: cast(a) for name, a in tensors.items()})
  return params, json.loads(metadata[_METADATA])


def read_tensors(
  path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads a safetensors file to host memory, with its metadata.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is not whole.
  """
  if not path.is_file():
    raise FileNotFoundError(f"`path` must be a file; there is no {path}.")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()  # the file itself is not iterable
      tensors = {name: file.get_tensor(name) for name in names}
      return tensors, file.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"`path` must be a whole safetensors file; {path} is not ({error})."
      " Copy or write it again."
    ) from error


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
