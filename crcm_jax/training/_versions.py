"""What decides a run's bits, beside its config: this code and its libraries."""

import functools
import hashlib
import importlib.metadata
import os
import pathlib

from crcm_jax._version import __version__


@functools.cache
def versions() -> dict[str, str]:
  """Returns the versions by name; "source" is a hash of this package's code."""
  libraries = ("jax", "jaxlib")
  return {
    "crcm_jax": __version__,
    "source": source_hash(pathlib.Path(__file__).parents[1]),
    **{name: importlib.metadata.version(name) for name in libraries},
  }


def source_hash(package: pathlib.Path) -> str:
  """Returns a hash of the Python files of a package, linked folders included.

  A version stays the same between two releases; the code does not.
  """
  digest = hashlib.sha256()
  for folder, _, names in sorted(os.walk(package, followlinks=True)):
    for name in sorted(name for name in names if name.endswith(".py")):
      path = pathlib.Path(folder, name)
      digest.update(f"{path.relative_to(package).as_posix()}\n".encode())
      digest.update(path.read_bytes())
  return digest.hexdigest()[:12]
