"""Tensors of a `.pt` or `.pth` file, without torch and without running code.

`torch.save` writes a zip archive: `data.pkl`, a pickle of the object in which
each tensor is a call of `_rebuild_tensor_v2` on a storage, and one record
`data/KEY` of raw numbers for each storage. A pickle can call anything; here it
finds those few names and nothing else, each bound to a harmless stand-in.
"""

import collections
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


class LazyTensor(NamedTuple):
  """A tensor that is read when it is wanted."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class _Storage(NamedTuple):
  record: str
  dtype: np.dtype
  size: int


class _Unpickler(pickle.Unpickler):
  """Builds containers and `LazyTensor`s, and refuses everything else."""

  def __init__(self, file: Any, path: Any, folder: str, source: Any = None):
    super().__init__(file)
    self._path, self._folder = path, folder
    self._source = path if source is None else source

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
      return _DTYPES[name]
    allowed = {
      ("collections", "OrderedDict"): lambda *items: collections.OrderedDict(
        *items
      ),
      ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
      ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
      ("torch", "Size"): lambda *sizes: tuple(*sizes),
    }
    if (module, name) in allowed:
      found = allowed[module, name]
      # A fresh function: a pickle may set attributes of what it finds.
      return lambda *args: found(*args)
    raise ValueError(
      "the checkpoint must hold tensors, numbers and containers only;"
      f" {self._path} also calls `{module}.{name}`, which could run any code"
      " and is refused. Save its state dict alone:"
      " `torch.save(model.state_dict(), path)`."
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, size = pid
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"unknown storage {pid}")
    return _Storage(f"{self._folder}/data/{key}", dtype, int(size))

  def _tensor(
    self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any
  ) -> LazyTensor:
    shape, stride = tuple(map(int, size)), tuple(map(int, stride))
    last = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    inside = (
      min((offset, *stride), default=0) >= 0 and min(shape, default=1) >= 0
    )
    if math.prod(shape) and not (inside and offset + last < storage.size):
      raise pickle.UnpicklingError(f"a tensor {shape} exceeds its storage")

    def read() -> np.ndarray:
      return _read(self._path, self._source, storage, offset, shape, stride)

    return LazyTensor(shape, storage.dtype, read)


def _read(
  path: Any,
  source: Any,
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  stride: tuple[int, ...],
) -> np.ndarray:
  """Reads one tensor; the archive's checksum covers it."""
  try:
    with zipfile.ZipFile(source) as archive:
      raw = archive.read(storage.record)
  except (zipfile.BadZipFile, KeyError, EOFError) as error:
    raise _broken(path, error) from error
  numbers = np.frombuffer(raw, storage.dtype)
  if len(numbers) < storage.size:
    raise _broken(path, f"{storage.record} is too short")
  bytes_of = storage.dtype.itemsize
  return np.lib.stride_tricks.as_strided(
    numbers[offset:], shape, [s * bytes_of for s in stride], writeable=False
  )


def open_torch(
  path: str | pathlib.Path, file: io.BytesIO | None = None
) -> dict[str, LazyTensor]:
  """Lists the tensors of a file that `torch.save` wrote.

  Args:
    path: the file.
    file: where it is part of another file, its bytes; `path` then only names
      it in errors.

  Returns:
    Tensors by name; where dicts are nested, names are joined by "."; a tensor
    that was saved alone has the name "". What is no tensor (a step, a config)
    is left out.

  Raises:
    ValueError: if the file is not whole, or its pickle asks for anything but
      tensors and containers.
  """
  source = path if file is None else file
  try:
    with zipfile.ZipFile(source) as archive:
      pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
      if len(pickles) != 1:
        raise zipfile.BadZipFile("no data.pkl in it")
      folder = pickles[0].removesuffix("/data.pkl")
      order = f"{folder}/byteorder"
      if order in archive.namelist() and archive.read(order) != b"little":
        raise zipfile.BadZipFile("numbers are not little-endian")
      with archive.open(pickles[0]) as stream:
        content = _Unpickler(stream, path, folder, source).load()
  except ValueError:
    raise
  except Exception as error:  # a broken pickle can raise anything
    raise _broken(path, error) from error
  return dict(_flatten("", content))


def _flatten(name: str, content: Any):
  """Yields the tensors of nested dicts."""
  if isinstance(content, LazyTensor):
    yield name, content
  elif isinstance(content, dict):
    for key, value in content.items():
      yield from _flatten(f"{name}.{key}" if name else str(key), value)


def _broken(path: Any, why: Any) -> ValueError:
  return ValueError(
    "`path` must be a whole file of `torch.save`, in its zip format of torch"
    f" 1.6 or later; {path} is not ({why}). Copy it again, or load it in torch"
    " and save its state dict."
  )
