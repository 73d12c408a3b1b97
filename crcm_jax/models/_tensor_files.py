"""Checkpoints of any format as names and tensors that are read one by one.

A file's first bytes tell its format, whatever it is called:

* safetensors: one file, or shards that an index file lists;
* torch's zip format, read without torch and without running code;
* anything else is an error that says what it seems to be.

Written is safetensors, one tensor after the other.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from crcm_jax.models._torch_file import LazyTensor, open_torch

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class TensorFile(NamedTuple):
  """The tensors of a checkpoint and what it says of itself."""

  tensors: dict[str, LazyTensor]
  metadata: dict[str, str]


def in_memory(arrays: Mapping[str, Any]) -> TensorFile:
  """Takes arrays for a checkpoint."""

  def lazy(a: Any) -> LazyTensor:
    return LazyTensor(tuple(a.shape), np.dtype(a.dtype), lambda: np.asarray(a))

  return TensorFile({name: lazy(a) for name, a in arrays.items()}, {})


def open_tensors(path: pathlib.Path) -> TensorFile:
  """Opens a checkpoint; its tensors stay on disk until they are read.

  Args:
    path: a file (`.safetensors`, `.pt`, `.pth`, an index `*.index.json`) or a
      folder that holds one checkpoint.

  Raises:
    FileNotFoundError: if there is no such file, or a shard of it is missing.
    ValueError: if it is not whole, of no known format, or a pickle with code.
  """
  if path.is_dir():
    return open_tensors(_only_checkpoint(path))
  if not path.is_file():
    raise FileNotFoundError(f"`path` must be a file; there is no {path}.")
  if path.name.endswith(".index.json"):
    return _open_shards(path)
  with path.open("rb") as file:
    start = file.read(64)
  if start[:2] == b"PK":
    return TensorFile(open_torch(path), {})
  if start[8:9] == b"{":
    return _open_safetensors(path)
  raise ValueError(
    f"`path` must be a safetensors file or one of `torch.save`; {path}"
    f" {_seems(start)}"
  )


def _seems(start: bytes) -> str:
  """Says what a file seems to be, and the cure."""
  text = start.lstrip().lower()
  if not start:
    return "is empty. Download it again."
  if text.startswith((b"<!doctype", b"<html", b"<?xml")):
    return (
      "is a web page saved under that name. Download the file itself, logged"
      " in where its page asks for it."
    )
  if text.startswith(b"version https://git-lfs"):
    return "is a pointer of Git LFS. Fetch the file itself: `git lfs pull`."
  if start[:1] == b"\x80":
    return (
      "is a plain pickle, as torch before 1.6 wrote it, and is not read. Load"
      " it in torch and save its state dict again."
    )
  return (
    f"starts with {start[:16]!r} and is neither, or not whole. Copy it again."
  )


def _only_checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Finds the checkpoint of a folder: an index, or a file."""
  for pattern in ("*.index.json", "*.safetensors", "*.pt", "*.pth", "*.bin"):
    found = sorted(folder.glob(pattern))
    if len(found) == 1:
      return found[0]
    if found:
      raise ValueError(
        f"`path` must hold one checkpoint; {folder} has"
        f" {[file.name for file in found]}. Name one of them."
      )
  raise FileNotFoundError(
    f"`path` must hold a checkpoint; {folder} has no *.index.json,"
    " *.safetensors, *.pt, *.pth or *.bin."
  )


def _open_shards(index: pathlib.Path) -> TensorFile:
  try:
    weight_map = json.loads(index.read_text())["weight_map"]
    names = sorted(set(weight_map.values()))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"`path` must be an index with a `weight_map`; {index} is not"
      f" ({error!r}). Copy it again."
    ) from error
  missing = [name for name in names if not (index.parent / name).is_file()]
  if missing:
    raise FileNotFoundError(
      f"`path` must come with all its shards; {index} also lists {missing}."
      " Copy them beside it."
    )
  shards = {name: open_tensors(index.parent / name) for name in names}
  absent = [
    k for k, name in weight_map.items() if k not in shards[name].tensors
  ]
  if absent:
    raise ValueError(
      f"`path` must be an index of its shards; {index} lists {absent[:3]},"
      " which they do not hold. Copy index and shards from one place."
    )
  tensors = {k: shards[name].tensors[k] for k, name in weight_map.items()}
  metadata: dict[str, str] = {}
  for shard in shards.values():
    metadata |= shard.metadata
  return TensorFile(tensors, metadata)


def _open_safetensors(path: pathlib.Path) -> TensorFile:
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      names = file.keys()  # the file itself is not iterable
      tensors = {name: _lazy(path, file, name) for name in names}
      return TensorFile(tensors, file.metadata() or {})
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"`path` must be a whole safetensors file; {path} is not ({error})."
      " Copy or write it again."
    ) from error


def _lazy(path: pathlib.Path, file: Any, name: str) -> LazyTensor:
  about = file.get_slice(name)
  dtype = about.get_dtype()
  if dtype not in _DTYPES:
    raise ValueError(
      f"`path` must hold tensors of {sorted(_DTYPES)}; {name!r} of"
      f" {path} is {dtype}. Convert it where it was quantised."
    )

  def read() -> np.ndarray:
    with safetensors.safe_open(path, framework="numpy") as file:
      return file.get_tensor(name)

  shape = tuple(about.get_shape())
  return LazyTensor(shape, _DTYPES[dtype], read)


def write_tensors(
  path: pathlib.Path,
  tensors: Mapping[str, LazyTensor],
  metadata: Mapping[str, str],
) -> None:
  """Writes a safetensors file, reading one tensor at a time.

  Args:
    path: the file; it is moved there when complete.
    tensors: tensors by name, written in this order, wide dtypes first so that
      each is aligned.
    metadata: strings to keep beside them.
  """
  names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
  header: dict[str, Any] = {"__metadata__": dict(metadata)}
  start = 0
  for name in names:
    tensor = tensors[name]
    stop = start + math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {
      "dtype": _DTYPE_NAMES[tensor.dtype],
      "shape": tensor.shape,
      "data_offsets": (start, stop),
    }
    start = stop
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    with part.open("wb") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      for name in names:
        value = np.ascontiguousarray(tensors[name].read())
        file.write(value.reshape(-1).view(np.uint8).data)
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
