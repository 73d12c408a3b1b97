"""One run at a time in a workdir.

Two would write over each other's checkpoints and metrics. Process 0 of a run
therefore holds a lock of the operating system on a file of the workdir. It ends
with the process, however that ends, so the file that is left behind, which says
who wrote it, keeps nobody out.

The lock is POSIX's, on a range of bytes, and not `flock`'s: NFS keeps it
between hosts by itself, and a worker process that outlives the one that trains
does not inherit it.
"""

import contextlib
import errno
import functools
import logging
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from crcm_jax.training import _processes

_LOG = logging.getLogger(__name__)

NAME = ".lock"
"""The file that is locked; it is never removed."""

_GRACE = 5.0  # seconds in which a run that is just ending may let go
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

_mine: set[pathlib.Path] = set()  # this process's, on every process of a run


@contextlib.contextmanager
def holding(*workdirs: pathlib.Path) -> Iterator[None]:
  """Keeps other runs out of workdirs; all processes of a run call it.

  Inside, a workdir that is held already is not locked again.

  Args:
    workdirs: of stages; made if they are missing.

  Raises:
    OSError: on all processes, if another run is in one of them, or process 0
      cannot write there.
  """
  new = {workdir.resolve() for workdir in workdirs} - _mine
  with contextlib.ExitStack() as locks:
    problem = None
    if new and _processes.is_first_process():
      problem = _lock_all(sorted(new), locks)
    timeout = _processes.start_timeout()
    if problem := _processes.gather(problem, timeout)[0]:
      raise OSError(problem)
    _mine.update(new)
    locks.callback(_mine.difference_update, new)
    yield


def _lock_all(
  workdirs: list[pathlib.Path], locks: contextlib.ExitStack
) -> str | None:
  """Locks workdirs until `locks` is closed; returns why that failed."""
  for workdir in workdirs:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      file = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT, 0o666)
      locks.callback(os.close, file)
      if not _lock(file, _GRACE):
        return _in_use(workdir, _read(file))
      os.ftruncate(file, 0)
      os.pwrite(file, _me().encode(), 0)
    except OSError as error:
      return (
        f"process 0 cannot lock `workdir`: {error.strerror}:"
        f" {str(workdir / NAME)!r} on {socket.gethostname()}"
      )
  return None


def _lock(file: int, grace: float) -> bool:
  """Locks an open file; False if another process holds it all the time."""
  try:
    import fcntl  # Windows has none.
  except ImportError as error:
    _warn(str(error))
    return True
  end = time.monotonic() + grace
  while True:
    try:
      fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except OSError as error:
      if error.errno in _NO_LOCKS:
        _warn(error.strerror)
        return True
      if error.errno not in _HELD:
        raise
    if time.monotonic() >= end:
      return False
    time.sleep(0.1)


def _me() -> str:
  return f"process {os.getpid()} on {socket.gethostname()}"


def _read(file: int) -> str:
  """Returns who holds a file, if it was written already."""
  return os.pread(file, 1000, 0).decode(errors="replace") or "another process"


def _in_use(workdir: pathlib.Path, holder: str) -> str:
  return (
    f"`workdir` must be in use by one run alone; {holder} is training in"
    f" {str(workdir)!r}. Stop it, or choose another `--workdir`."
  )


@functools.cache
def _warn(reason: str) -> None:
  """Says once that nothing is locked."""
  _LOG.warning(
    "`workdir` cannot be locked there (%s): see that no other run uses it.",
    reason,
  )
