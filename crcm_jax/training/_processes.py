"""Several processes that run one training: how they start, agree and end.

All run the same program on their own devices, so none may take a turn that the
others do not take: it would wait for them for ever. What only one process can
know, such as a signal or an error, is therefore told to all before any acts.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from crcm_jax.training import _jax_distributed, _rendezvous

START_TIMEOUT = 300.0
"""Seconds that processes wait for each other, unless told otherwise."""

_HEARTBEAT = 100.0  # seconds after which a silent process counts as dead
_DAY = 86400.0  # seconds; who is dead by then is long known to be
_PATIENCE = 5.0  # seconds until an error that all raise is raised by all
_WATCH = 1.0  # seconds between two looks whether another process failed

_calls = itertools.count()
_timeout = START_TIMEOUT


def initialize(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: float = START_TIMEOUT,
  heartbeat: float = _HEARTBEAT,
) -> None:
  """Connects the processes of a run; a lone process needs nothing.

  Call it before anything that uses a device. On Cloud TPU, GKE, SLURM, Open MPI
  and Kubernetes jobs no argument is needed.

  Args:
    coordinator: HOST:PORT of process 0, as all processes reach it.
    num_processes: how many processes there are; 1 looks for no others.
    process_id: of this one, from 0.
    timeout: seconds that the processes wait for each other, now and at the
      start of each stage.
    heartbeat: seconds after which a process that gives no sign counts as dead.

  Raises:
    ValueError: if only some of the three are given, they do not fit together,
      or the processes have unequal numbers of devices.
    TimeoutError: if the coordinator or another process is not there in time.
    OSError: if the coordinator's port is taken.
  """
  global _timeout
  if jax.distributed.is_initialized():
    return
  cluster = _cluster(coordinator, num_processes, process_id, timeout)
  if cluster is None:
    return
  _timeout = timeout
  _rendezvous.meet(
    *(cluster.coordinator, cluster.num_processes, cluster.process_id), timeout
  )
  _jax_distributed.initialize(cluster, timeout, heartbeat)
  _check_devices(cluster.num_processes)


def _cluster(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  timeout: float,
) -> _jax_distributed.Cluster | None:
  """Returns where and which process this is, or None if it is alone."""
  if num_processes == 1 and not process_id:
    return None
  if coordinator is num_processes is process_id is None:
    return _detected(timeout)
  if coordinator is None or num_processes is None or process_id is None:
    raise ValueError(
      "`--coordinator HOST:PORT`, `--num-processes N` and `--process-id I` must"
      f" be given together; got {coordinator}, {num_processes} and"
      f" {process_id}. Leave all out where JAX finds the processes itself."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"`--process-id` must lie in [0, {num_processes}), the number of"
      f" processes; got {process_id}."
    )
  _rendezvous.split_address(coordinator)
  return _jax_distributed.Cluster(coordinator, num_processes, process_id)


def _detected(timeout: float) -> _jax_distributed.Cluster | None:
  """Returns the cluster that JAX finds, or None if it finds no other process.

  Raises:
    ValueError: if it finds a cluster, but not which process this is.
  """
  try:
    cluster = _jax_distributed.detect(timeout)
  except Exception as error:  # Of the cluster's own library.
    raise ValueError(
      "this seems to be one process of a cluster, but which is not clear:"
      f" {error} Give `--num-processes 1` if it is alone, and else"
      " `--coordinator`, `--num-processes` and `--process-id`."
    ) from error
  alone = cluster is None or cluster.num_processes == 1
  return None if alone else cluster


def _check_devices(num_processes: int) -> None:
  """Raises on all processes unless all have equally many devices."""
  counts = [0] * jax.process_count()
  for device in jax.devices():
    counts[device.process_index] += 1
  if len(counts) != num_processes or len(set(counts)) > 1:
    raise ValueError(
      f"each of the {num_processes} processes must have equally many devices;"
      f" those of process 0, 1, ... are {counts}. Start one process a host, or"
      " show each the same number of devices (`CUDA_VISIBLE_DEVICES`,"
      " `JAX_NUM_CPU_DEVICES`)."
    )


def start_timeout() -> float:
  """Returns the seconds that processes wait for each other."""
  return _timeout


def is_first_process() -> bool:
  """Whether this is the process that writes what is written once."""
  return jax.process_index() == 0


def gather(value: Any, timeout: float = _DAY) -> list[Any]:
  """Returns the value of each process, in their order.

  Args:
    value: JSON values; all processes must call this equally often.
    timeout: seconds to wait for the others. One that dies meanwhile is found
      sooner, by its heartbeat.

  Raises:
    TimeoutError: if a process does not come in time.
  """
  count = jax.process_count()
  if count == 1:
    return [value]
  store, call = _jax_distributed.Store(), next(_calls)
  store.put(f"{call}/{jax.process_index()}", json.dumps(value))
  end = time.monotonic() + timeout
  left = lambda: max(0.001, end - time.monotonic())
  texts = [store.get(f"{call}/{i}", left()) for i in range(count)]
  if missing := [i for i, text in enumerate(texts) if text is None]:
    raise TimeoutError(
      f"processes {missing} did not come within {timeout:g} seconds; see what"
      " they print."
    )
  return [json.loads(text) for text in texts if text is not None]


def meet(name: str) -> None:
  """Waits until all processes are at the place of that name.

  Unlike `wait_for_all` it may be called in a thread beside the main one.

  Args:
    name: of the place; all processes come there once.
  """
  if jax.process_count() > 1:
    _jax_distributed.Store().meet(name, _DAY)


def wait_for_all() -> None:
  """Waits until all processes are here.

  What the first one wrote before is then there for all.
  """
  gather(None)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends all processes when one of them fails.

  An error that all raise is left to each. One that only this process raises is
  printed here and told to the others, which then end too, whatever they wait
  for. Without it they would wait for this process until JAX finds it dead.
  """
  if jax.process_count() == 1:
    yield
    return
  done = threading.Event()
  watch = threading.Thread(target=_end_with_others, args=(done,), daemon=True)
  watch.start()
  try:
    yield
    wait_for_all()  # JAX's own end waits for minutes only.
  except BaseException as error:
    if not _jax_distributed.Store().meet("all raise", _PATIENCE):
      _end_all(error)
    raise
  finally:
    done.set()
    watch.join()


def _end_all(error: BaseException) -> None:
  """Tells the others why this process ends, and ends it.

  A usual exit would wait for them, who wait for this process.
  """
  status = getattr(error, "exit_status", 1)  # of an error that is none
  if status == 1:
    traceback.print_exception(error)
    reason = f"failed: {type(error).__name__}: {error}"
  else:
    print(f"crcm: {error}", file=sys.stderr)
    reason = "was asked to stop"
  here = f"process {jax.process_index()} on {socket.gethostname()}"
  said = [jax.process_index(), f"{here} {reason}", status]
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    _jax_distributed.Store().put("end", json.dumps(said))
  time.sleep(3 * _WATCH)  # They say why, before they find this one gone.
  _leave(status)


def _end_with_others(done: threading.Event) -> None:
  """Ends this process when another one says that it ends all."""
  store = _jax_distributed.Store()
  while not done.wait(_WATCH):
    if (text := store.peek("end")) is None:
      continue
    process, reason, status = json.loads(text)
    if process != jax.process_index():
      print(f"crcm: stopped, for {reason}", file=sys.stderr)
      _leave(status)


def _leave(status: int) -> None:
  """Ends this process at once; the first one, which keeps the store, last."""
  sys.stdout.flush()
  sys.stderr.flush()
  if is_first_process():
    time.sleep(5 * _WATCH)  # longer than the one that failed waits
  os._exit(status)


class AnyProcess:
  """Whether an event happened in any process, as all learn at the same call.

  Every call sends this process's answer to the others' devices, and returns
  what they said at the call before, so that no step waits for the sum.
  """

  def __init__(self, event: threading.Event):
    """Prepares the exchange; alone, the event itself is the answer."""
    self._event = event
    self._alone = jax.process_count() == 1
    self._sent: Any = None
    if not self._alone:
      self._split = NamedSharding(_one_device_each(), PartitionSpec("process"))
      whole = NamedSharding(self._split.mesh, PartitionSpec())
      self._any = jax.jit(lambda flags: flags.any(), out_shardings=whole)

  def is_set(self, *, now: bool = False) -> bool:
    """Returns the answer of the call before; with `now`, of this one."""
    if self._alone:
      return self._event.is_set()
    before = self._sent
    flag = np.array([self._event.is_set()])
    self._sent = self._any(
      jax.make_array_from_process_local_data(self._split, flag)
    )
    known = (before, self._sent) if now else (before,)
    return any(bool(answer) for answer in known if answer is not None)


def _one_device_each() -> Mesh:
  first = {d.process_index: d for d in reversed(jax.devices())}
  devices = np.array([first[i] for i in range(jax.process_count())])
  return Mesh(devices, ("process",), axis_types=(AxisType.Auto,))
