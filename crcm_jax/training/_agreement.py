"""What all processes must have in common before a stage starts.

The config and the versions, compared by a hash and named key by key where they
differ; and the workdir, where the first process leaves a token for the others
to find. Each check raises the same error on every process.
"""

import contextlib
import os
import pathlib
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax

from crcm_jax.training import _config, _processes
from crcm_jax.training._versions import versions

_SIGHT = 60.0  # seconds in which a network file system shows a new file
_SHOWN = 5  # differing keys to name


def check_start(config: Mapping[str, Any], workdir: pathlib.Path) -> None:
  """Raises on all processes unless all run the same in one shared folder.

  Args:
    config: what this process is about to run.
    workdir: where; made if it is missing.

  Raises:
    ValueError: if configs, versions or devices differ, naming in what.
    OSError: if some process does not see what the first one writes.
  """
  if jax.process_count() > 1:
    _check_same(config)
    _check_shared(workdir)


def _check_same(config: Mapping[str, Any]) -> None:
  mine = {
    "host": socket.gethostname(),
    "hash": _config.config_hash(config),
    "versions": versions() | {"device": jax.local_devices()[0].device_kind},
  }
  first, *others = everyone = _gather(mine)
  same = lambda one: {**one, "host": None} == {**first, "host": None}
  if all(map(same, others)):
    return
  configs = _gather(_config.as_dict(config))
  texts = [
    _difference(i, everyone, configs)
    for i, one in enumerate(everyone)
    if not same(one)
  ]
  raise ValueError(
    "all processes must run the same config with the same versions;"
    f" {'; '.join(texts)}. Start all with the same command and the same files."
  )


def _difference(
  process: int, everyone: list[dict[str, Any]], configs: list[dict[str, Any]]
) -> str:
  """Says in what a process differs from the first one."""
  first, one = everyone[0], everyone[process]
  keys = _config.differences(first["versions"], one["versions"])
  keys += _config.differences(configs[0], configs[process])
  more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
  return (
    f"process {process} on {one['host']} (config hash {one['hash']}) differs"
    f" from process 0 on {first['host']} ({first['hash']}) in"
    f" {', '.join(keys[:_SHOWN])}{more}"
  )


def _check_shared(workdir: pathlib.Path) -> None:
  token, error = None, None
  if _processes.is_first_process():
    token = workdir / f".process-0-{uuid.uuid4().hex}"
    error = _write(token)
  name, error = _gather([token and token.name, error])[0]
  seen = error is not None or _appears(workdir / name)
  mine = None if seen else f"process {jax.process_index()} in {_where(workdir)}"
  blind = [text for text in _gather(mine) if text]
  if token is not None:
    with contextlib.suppress(OSError):
      token.unlink()
  if error is not None:
    raise OSError(f"process 0 cannot write to `workdir`: {error}")
  if blind:
    raise OSError(
      "`workdir` must be one folder that all hosts share; what process 0 wrote"
      f" there is not seen by {', '.join(blind)}. Give a folder of a file"
      " system that is mounted on every host, under the same path."
    )


def _write(token: pathlib.Path) -> str | None:
  """Writes the token; returns why that failed."""
  try:
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
  except OSError as error:
    return f"{error.strerror}: {str(token.parent)!r} on {socket.gethostname()}"
  return None


def _appears(token: pathlib.Path) -> bool:
  """Waits for a file, as long as a network file system may take."""
  end = time.monotonic() + min(_SIGHT, _processes.start_timeout() / 4)
  while time.monotonic() < end:
    # Listing the folder makes a network file system look again.
    with contextlib.suppress(OSError):
      if token.name in os.listdir(token.parent):
        return True
    time.sleep(0.1)
  return False


def _where(workdir: pathlib.Path) -> str:
  return f"{str(workdir.absolute())!r} on {socket.gethostname()}"


def _gather(value: Any) -> list[Any]:
  return _processes.gather(value, _processes.start_timeout())
