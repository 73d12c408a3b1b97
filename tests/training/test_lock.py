"""Two runs in one workdir, of which the first is a process that is killed."""

import errno
import fcntl
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys

import processes
import pytest
import tiny

from crcm_jax import cli
from crcm_jax.training import _lock, _loop

CONFIG = str(processes.HERE / "process_config.py")

# Holds a workdir; so does a worker of it, if the lock is handed on.
HOLDER = """
import os, pathlib, sys, time
from crcm_jax.training import _lock
with _lock.holding(pathlib.Path(sys.argv[1])):
  worker = os.fork()
  if worker:
    print(worker, flush=True)
  time.sleep(300)
"""

PROBE = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), 6)"  # EX | NB


class Holder:
  """Another process that is in a workdir, and a worker process of it."""

  def __init__(self, workdir):
    self._process = subprocess.Popen(
      [sys.executable, "-W", "ignore", "-c", HOLDER, workdir],
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"PYTHONPATH": str(processes.HERE.parent)},
    )
    self.pid = self._process.pid
    self.worker = int(self._process.stdout.readline())

  def kill(self):
    """Ends it at once; the worker stays."""
    self._process.kill()
    self._process.wait()
    self._process.stdout.close()  # whose other end the worker has, too


@pytest.fixture
def folders(tmp_path):
  return _loop.Folders(tmp_path / "run", tmp_path / "data")


@pytest.fixture
def hold(monkeypatch):
  monkeypatch.setattr(_lock, "_GRACE", 0.0)
  holders = []

  def start(workdir):
    holders.append(Holder(workdir))
    return holders[-1]

  yield start
  for holder in holders:
    os.kill(holder.worker, signal.SIGKILL)
    holder.kill()


def is_free(workdir):
  """Whether another process can lock a workdir."""
  words = [sys.executable, "-S", "-c", PROBE, workdir / _lock.NAME]
  return subprocess.run(words, capture_output=True).returncode == 0


def test_a_stage_is_trained_by_one_process_until_that_is_killed(folders, hold):
  workdir = folders.experiment / "diffusion"
  holder = hold(workdir)
  message = (
    rf"`workdir` must be in use by one run alone; process {holder.pid} on"
    rf" {socket.gethostname()} is training in '{workdir}'. Stop it, or choose"
    r" another `--workdir`"
  )
  with pytest.raises(OSError, match=message):
    _loop.train_stage(tiny.stage(steps=1), folders)
  assert [path.name for path in workdir.iterdir()] == [_lock.NAME]
  holder.kill()
  os.kill(holder.worker, 0)  # alive
  with tiny.compile_fast():
    _loop.train_stage(tiny.stage(steps=1), folders)
  assert str(os.getpid()) in (workdir / _lock.NAME).read_text()


def test_a_command_locks_all_its_stages_before_it_writes(
  folders, hold, capsys, restore_logging
):
  """The other run may be at its last stage already."""
  holder = hold(folders.experiment / "matching")
  words = ["train", "--config", f"{CONFIG}:diffusion,matching", "--workdir"]
  assert cli.main([*words, str(folders.experiment)]) == 2
  error = capsys.readouterr().err
  assert (
    f"crcm: `workdir` must be in use by one run alone; process {holder.pid}"
    in error
  )
  assert not (folders.experiment / "experiment.json").exists()
  assert is_free(folders.experiment / "diffusion")


def test_a_lock_is_held_to_the_end_of_the_outer_with(tmp_path):
  a, b = tmp_path / "a", tmp_path / "b"
  with _lock.holding(a, b):
    assert not is_free(a)
    with _lock.holding(pathlib.Path(tmp_path, "b", "..", "b")):
      pass
    assert not is_free(b)
  assert is_free(a)
  assert is_free(b)


def test_a_run_that_is_ending_is_waited_for(tmp_path, monkeypatch):
  with _lock.holding(tmp_path):
    pass
  lock, asked = fcntl.lockf, []

  def busy_at_first(*arguments):
    asked.append(arguments)
    if len(asked) == 1:
      raise BlockingIOError(errno.EAGAIN, "busy")
    lock(*arguments)

  monkeypatch.setattr(fcntl, "lockf", busy_at_first)
  with _lock.holding(tmp_path):
    assert len(asked) == 2
    assert not is_free(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_without_locks_a_run_warns_once(tmp_path, monkeypatch, caplog, code):
  def lockf(*arguments):
    raise OSError(code, "no locks")

  monkeypatch.setattr(fcntl, "lockf", lockf)
  _lock._warn.cache_clear()
  with caplog.at_level(logging.WARNING, logger="crcm_jax"):
    for name in ("a", "b"):
      with _lock.holding(tmp_path / name):
        pass
  (record,) = caplog.records
  assert record.getMessage() == (
    "`workdir` cannot be locked there (no locks): see that no other run uses"
    " it."
  )


def test_a_workdir_that_cannot_be_written_is_named():
  message = r"process 0 cannot lock `workdir`: .*: '/proc/none/.lock' on \S+"
  none = pathlib.Path("/proc/none")
  with pytest.raises(OSError, match=message), _lock.holding(none):
    pass


def test_other_errors_of_locking_are_told(tmp_path, monkeypatch):
  def lockf(*arguments):
    raise OSError(errno.EIO, "broken")

  monkeypatch.setattr(fcntl, "lockf", lockf)
  message = r"process 0 cannot lock `workdir`: broken: '.*/.lock' on \S+"
  with pytest.raises(OSError, match=message), _lock.holding(tmp_path):
    pass
