"""The few parts of JAX's distributed runtime that have no public name.

They are how JAX 0.10 and 0.11 find the processes of a cluster, and the store of
texts that its coordinator keeps for all of them. Between CPUs the collectives
are gloo's, as is JAX's default.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax._src import clusters, distributed


class Cluster(NamedTuple):
  """Where and which one of several processes this is.

  Attributes:
    coordinator: HOST:PORT of process 0.
    num_processes: of the run.
    process_id: of this process.
    local_device_ids: devices that this process shall use; None for all.
  """

  coordinator: str
  num_processes: int
  process_id: int
  local_device_ids: Sequence[int] | None = None


def detect(timeout: float) -> Cluster | None:
  """Finds the cluster: Cloud TPU, GKE, SLURM, Open MPI, Kubernetes."""
  coordinator, count, process, devices = (
    clusters.ClusterEnv.auto_detect_unset_distributed_params(
      *(None, None, None, None, None), int(timeout)
    )
  )
  if coordinator is None or count is None or process is None:
    return None
  return Cluster(coordinator, count, process, devices)


def initialize(cluster: Cluster, timeout: float, heartbeat: float) -> None:
  """Connects this process to the others; they are known to be there."""
  # The loop has its own signal handler, and JAX's would take its place.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    *cluster,
    cluster_detection_method="deactivate",
    initialization_timeout=int(timeout),
    heartbeat_timeout_seconds=int(heartbeat),
  )


class Store:
  """Texts by name that all processes read and write."""

  def __init__(self):
    self._client: Any = distributed.global_state.client
    if self._client is None:
      raise RuntimeError(
        "several processes need `crcm_jax.training.initialize()`, before"
        " anything uses a device."
      )

  def put(self, name: str, text: str) -> None:
    """Writes a text; a name is written once."""
    self._client.key_value_set(f"crcm_jax/{name}", text)

  def get(self, name: str, timeout: float) -> str | None:
    """Returns a text, waiting for it; None if it does not come."""
    try:
      return self._client.blocking_key_value_get(
        f"crcm_jax/{name}", int(1000 * timeout)
      )
    except jax.errors.JaxRuntimeError:
      return None

  def peek(self, name: str) -> str | None:
    """Returns a text, or None if it is not there."""
    try:
      return self._client.key_value_try_get(f"crcm_jax/{name}")
    except jax.errors.JaxRuntimeError:
      return None

  def meet(self, name: str, timeout: float) -> bool:
    """Waits until all processes are here; False if some are not."""
    try:
      self._client.wait_at_barrier(f"crcm_jax/{name}", int(1000 * timeout))
    except jax.errors.JaxRuntimeError:
      return False
    return True
