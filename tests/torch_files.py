"""Files in the format of `torch.save`, written without torch."""

import io
import struct
import tarfile
import zipfile

import numpy as np

_STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
}


def torch_bytes(array):
  """Returns what `torch.save(tensor, file)` writes for a tensor."""
  array = np.ascontiguousarray(array)
  strides = tuple(s // array.itemsize for s in array.strides)
  return _file(array, array.shape, strides)


def repeated_torch_bytes(shape):
  """Returns a file whose single number stands for a tensor of any size."""
  return _file(np.ones(1, np.float32), shape, (0,) * len(shape))


def _file(array, shape, strides):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("archive/data.pkl", _pickle(array, shape, strides))
    archive.writestr("archive/byteorder", "little")
    archive.writestr("archive/data/0", array.tobytes())
    archive.writestr("archive/version", "3\n")
  return file.getvalue()


def _pickle(array, shape, strides):
  storage = _STORAGES[array.dtype.name]
  pid = _text("storage") + _name("torch", storage) + _text("0") + _text("cpu")
  pid = b"(" + pid + _int(array.size) + b"tQ"
  sizes = b"".join(
    b"(" + b"".join(map(_int, ns)) + b"t" for ns in (shape, strides)
  )
  hooks = _name("collections", "OrderedDict") + b")R"
  call = _name("torch._utils", "_rebuild_tensor_v2")
  return (
    b"\x80\x02"
    + call
    + b"("
    + pid
    + _int(0)
    + sizes
    + b"\x89"
    + hooks
    + (b"tR.")
  )


def _name(module, name):
  return f"c{module}\n{name}\n".encode()


def _text(text):
  return b"X" + struct.pack("<I", len(text)) + text.encode()


def _int(number):
  return b"J" + struct.pack("<i", number)


def write_tar(path, members):
  """Writes a tar of `{name: bytes}`."""
  with tarfile.open(path, "w") as tar:
    for name, raw in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(raw)
      tar.addfile(info, io.BytesIO(raw))
  return path
