"""The meeting before JAX connects the processes; here they are threads."""

import concurrent.futures
import socket
import struct
import time

import processes
import pytest

from crcm_jax.training import _rendezvous


@pytest.fixture
def address():
  return f"127.0.0.1:{processes.free_port()}"


def meet(address, *arrivals, timeout=20.0):
  """Returns what each arrival, of (number of processes, process), gets."""
  with concurrent.futures.ThreadPoolExecutor(len(arrivals)) as pool:
    futures = [
      pool.submit(_rendezvous.meet, address, count, process, timeout)
      for count, process in arrivals
    ]
  return [future.exception() for future in futures]


def test_all_leave_when_the_last_one_is_there(address):
  assert meet(address, (4, 3), (4, 1), (4, 0), (4, 2)) == [None] * 4


def test_the_others_may_come_before_the_coordinator(address):
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    early = pool.submit(_rendezvous.meet, address, 2, 1, 20.0)
    time.sleep(0.5)
    assert not early.done()
    _rendezvous.meet(address, 2, 0, 20.0)
  assert early.exception() is None


def test_an_unreachable_coordinator_is_named_in_time(address):
  start = time.monotonic()
  message = (
    rf"coordinator at {address} did not answer process 1 within 1 seconds"
    r" \(.*refused.*\). See that process 0 runs .* `--start-timeout SECONDS`"
  )
  with pytest.raises(TimeoutError, match=message):
    _rendezvous.meet(address, 2, 1, 1.0)
  assert time.monotonic() - start < 5


def test_a_host_without_a_name_is_no_crash():
  with pytest.raises(TimeoutError, match=r"at no.such.host.invalid:1234 did"):
    _rendezvous.meet("no.such.host.invalid:1234", 2, 1, 1.0)


def test_every_process_learns_who_is_missing(address):
  first, other = meet(address, (4, 0), (4, 2), timeout=2.0)
  assert isinstance(first, TimeoutError)
  assert isinstance(other, TimeoutError)
  assert "processes 1, 3 of 4 did not come within 2 seconds" in str(first)
  assert str(other) == f"process 0 says: {first}"


def test_disagreeing_numbers_of_processes_are_an_error_for_all(address):
  errors = meet(address, (2, 0), (3, 1))
  for error in errors:
    assert isinstance(error, ValueError)
    assert "process 0 was given 2, process 1 3" in str(error)


def test_two_processes_of_one_number_are_an_error_for_all(address):
  errors = meet(address, (3, 0), (3, 1), (3, 1))
  for error in errors:
    assert isinstance(error, ValueError)
    assert "two processes say that they are 1" in str(error)


def test_a_taken_port_is_named():
  with socket.create_server(("", 0)) as taken:
    port = taken.getsockname()[1]
    message = rf"must listen at port {port} of `--coordinator` .* a free port"
    with pytest.raises(OSError, match=message):
      _rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 1.0)


def test_who_is_no_process_of_the_run_is_sent_away(address):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(_rendezvous.meet, address, 2, 0, 20.0)
    for text in (b"GET / HTTP/1.1\n", b"{}\n", b"[1]\n"):
      with _connect(address) as stranger:
        stranger.sendall(text)
        assert stranger.recv(10) == b""
    reset = struct.pack("ii", 1, 0)  # ends a connection by an error
    with _connect(address) as stranger:
      stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    _rendezvous.meet(address, 2, 1, 20.0)
  assert first.exception() is None


def test_the_others_learn_that_the_first_one_was_ended(address, monkeypatch):
  def admit_and_end(server, guests, *more):
    guests.append(_rendezvous._accept(server, time.monotonic() + 20))
    raise KeyboardInterrupt

  monkeypatch.setattr(_rendezvous, "_admit_all", admit_and_end)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    first = pool.submit(_rendezvous.meet, address, 2, 0, 20.0)
    with pytest.raises(ValueError, match="process 0 says: it was ended"):
      _rendezvous.meet(address, 2, 1, 20.0)
    assert isinstance(first.exception(), KeyboardInterrupt)


def _connect(address):
  for _ in range(100):
    try:
      return socket.create_connection(_rendezvous.split_address(address))
    except OSError:
      time.sleep(0.1)
  raise AssertionError("process 0 does not listen")


@pytest.mark.parametrize(
  "address", ["host", "host:", ":1", "host:x", "h:70000"]
)
def test_an_address_has_host_and_port(address):
  with pytest.raises(ValueError, match=r"must have the form HOST:PORT"):
    _rendezvous.split_address(address)
