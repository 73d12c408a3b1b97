"""The files of a finished checkpoint, each with its SHA-256.

`SHA256SUMS` is written last, so that a folder which has one was written to its
end. It lists every other file, in the format of the command of that name:
`sha256sum -c SHA256SUMS` checks it by hand. A folder is whole if the list made
of what is there now is, byte for byte, the list that was written: a bit that
flipped, a file cut short, lost or added, and damage to the list itself show.
"""

import concurrent.futures
import hashlib
import os
import pathlib

NAME = "SHA256SUMS"


class Damaged(Exception):
  """A folder does not hold what was written."""


def write(folder: pathlib.Path) -> None:
  """Lists the files of a folder; the list appears whole or not at all."""
  new = folder / f"{NAME}.new"
  with new.open("w") as file:
    file.write(_list(folder))
    file.flush()
    os.fsync(file.fileno())
  new.rename(folder / NAME)


def is_in(folder: pathlib.Path) -> bool:
  """Whether a folder was written to its end."""
  return (folder / NAME).is_file()


def check(folder: pathlib.Path) -> None:
  """Raises `Damaged`, naming the files that are not as they were written."""
  written = (folder / NAME).read_bytes()
  now = _list(folder).encode()
  if written == now:
    return
  differ = set(written.splitlines()) ^ set(now.splitlines())
  names = {line.partition(b"  ")[2].decode(errors="replace") for line in differ}
  shown = [
    name if (folder / name).is_file() else f"{name} (lost)"
    for name in sorted(names)
  ]
  more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
  raise Damaged(f"changed since written: {', '.join(shown[:3])}{more}")


def _list(folder: pathlib.Path) -> str:
  """Returns one line a file, sorted; reads several files at once."""
  names = sorted(
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_file()
  )
  names = [name for name in names if name not in (NAME, f"{NAME}.new")]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    digests = pool.map(lambda name: _digest(folder / name), names)
    lines = zip(digests, names, strict=True)
    return "".join(f"{digest}  {name}\n" for digest, name in lines)


def _digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
