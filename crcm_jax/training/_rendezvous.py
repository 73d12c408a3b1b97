"""A meeting of all processes before JAX connects them.

JAX ends a process without an exception if its coordinator cannot be reached or
another process never comes. So the processes first meet here, over plain TCP
at the coordinator's address: process 0 listens, each other one says which it
is, and all leave together, or each with an error that says why not.
"""

import contextlib
import json
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

_RETRY = 0.2  # seconds between two tries to connect
_GRACE = 5.0  # seconds more that a process waits for process 0's verdict


def meet(
  address: str, num_processes: int, process_id: int, timeout: float
) -> None:
  """Waits until all processes are there.

  Args:
    address: HOST:PORT of process 0.
    num_processes: how many processes there are.
    process_id: of this one.
    timeout: seconds to wait.

  Raises:
    TimeoutError: if process 0 cannot be reached, or some process is missing.
    OSError: if process 0 cannot listen at the port.
    ValueError: if the processes disagree on their number, or two are the same.
  """
  deadline = time.monotonic() + timeout
  if process_id == 0:
    _host(address, num_processes, deadline, timeout)
  else:
    _join(address, num_processes, process_id, deadline, timeout)


def split_address(address: str) -> tuple[str, int]:
  """Returns host and port of HOST:PORT.

  Raises:
    ValueError: if it has another form.

  Example:
    >>> split_address("10.0.0.1:1234")
    ('10.0.0.1', 1234)
  """
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise ValueError(
      "`--coordinator` must have the form HOST:PORT, the address of process 0"
      f" as all processes reach it; got {address!r}."
    )
  return host.strip("[]"), int(port)


def _host(
  address: str, num_processes: int, deadline: float, timeout: float
) -> None:
  """Lets all others in, then tells them whether they are complete."""
  guests: list[socket.socket] = []
  verdict: dict[str, Any] = {"error": "it was ended", "late": False}
  with _listen(address) as server:
    try:
      _admit_all(server, guests, num_processes, deadline, timeout)
      verdict = {}
    except (ValueError, TimeoutError) as error:
      verdict = {"error": str(error), "late": isinstance(error, TimeoutError)}
      raise
    finally:
      for guest in guests:
        _say(guest, verdict)
        guest.close()


def _listen(address: str) -> socket.socket:
  _, port = split_address(address)
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    return socket.create_server(("", port))
  except OSError as error:
    raise OSError(
      f"process 0 must listen at port {port} of `--coordinator` {address},"
      f" which fails ({error.strerror}). Choose a free port, the same for all"
      " processes."
    ) from error


def _admit_all(
  server: socket.socket,
  guests: list[socket.socket],
  num_processes: int,
  deadline: float,
  timeout: float,
) -> None:
  missing = set(range(1, num_processes))
  while missing:
    if (guest := _accept(server, deadline)) is None:
      raise TimeoutError(
        f"{_names(sorted(missing))} of {num_processes} did not come within"
        f" {timeout:g} seconds. Start them with the same `--coordinator` and"
        " `--num-processes`, or wait longer with `--start-timeout SECONDS`."
      )
    hello = _hear(guest, time.monotonic() + _GRACE)
    if not isinstance(hello, dict) or hello.keys() != {"process", "of"}:
      guest.close()  # It is no process of a run.
      continue
    guests.append(guest)
    process, of = hello["process"], hello["of"]
    if of != num_processes:
      raise ValueError(
        "`--num-processes` must be the same for all processes; process 0 was"
        f" given {num_processes}, process {process} {of}."
      )
    if process not in missing:
      raise ValueError(
        "`--process-id` must be another one for each process; two processes"
        f" say that they are {process}."
      )
    missing.remove(process)


def _accept(server: socket.socket, deadline: float) -> socket.socket | None:
  server.settimeout(max(0.01, deadline - time.monotonic()))
  try:
    return server.accept()[0]
  except TimeoutError:
    return None


def _join(
  address: str,
  num_processes: int,
  process_id: int,
  deadline: float,
  timeout: float,
) -> None:
  """Goes to process 0, says who this is, and waits for its verdict."""
  reason = ""
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(split_address(address), left) as host:
        _say(host, {"process": process_id, "of": num_processes})
        verdict = _hear(host, deadline + _GRACE)
    except OSError as error:
      verdict, reason = None, str(error)
    if verdict == {}:
      return
    if isinstance(verdict, dict) and "error" in verdict:
      kind = TimeoutError if verdict["late"] else ValueError
      raise kind(f"process 0 says: {verdict['error']}")
    time.sleep(_RETRY)
  raise TimeoutError(
    f"the coordinator at {address} did not answer process {process_id} within"
    f" {timeout:g} seconds ({reason or 'no reason given'}). See that process 0"
    " runs there, that `--coordinator` is the same for all processes and that"
    " no firewall closes the port; or wait longer with `--start-timeout"
    " SECONDS`."
  )


def _say(to: socket.socket, what: Any) -> None:
  with contextlib.suppress(OSError):  # Who is gone will be missed later.
    to.sendall(json.dumps(what).encode() + b"\n")


def _hear(of: socket.socket, deadline: float) -> Any:
  """Returns what a process says, or None if it is gone or not one of ours."""
  text = b""
  while not text.endswith(b"\n") and len(text) < 4096:
    left = max(0.0, deadline - time.monotonic())
    if not select.select([of], [], [], left)[0]:
      return None
    try:
      part = of.recv(4096)
    except OSError:
      return None
    if not part:
      return None
    text += part
  try:
    return json.loads(text)
  except ValueError:
    return None


def _names(processes: Sequence[int]) -> str:
  if len(processes) == 1:
    return f"process {processes[0]}"
  some = ", ".join(map(str, processes[:8]))
  return f"processes {some}{', ...' if len(processes) > 8 else ''}"
