"""What a train step will take, before there is anything to run it on.

The roofline of a step is the time of its slowest part, if the others hid
behind it: operations at the chip's peak, bytes at the memory's bandwidth,
collectives at that of the interconnect. No step is faster.
"""

import dataclasses
from typing import Any, NamedTuple

from crcm_jax.training import flops
from crcm_jax.training._arguments import step_arguments
from crcm_jax.training._stages import Phase, Stage
from crcm_jax.training.plan import _compile
from crcm_jax.training.plan._chips import Chip, Topology
from crcm_jax.training.plan._hlo import Traffic, traffic
from crcm_jax.training.plan._memory import Memory, memory


class Roofline(NamedTuple):
  """Seconds that each part of a step takes by itself."""

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    """The slowest of them."""
    return max(self)

  @property
  def bound(self) -> str:
    """Which one that is."""
    return self._fields[self.index(self.step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
  """What one step of a stage takes.

  Attributes:
    mesh: devices along each axis.
    memory: bytes a device, by kind; of a program that the compiler refused
      without saying what it needs, the temporaries are 0.
    limit: bytes that a device has.
    error: why the compiler refused; "" if it did not.
    necessary: operations that the step cannot do without, on all devices
      together (`flops.step`).
    executed: operations of the step, what it computes twice included, on one
      device.
    traffic: what a device moves; None of a refused program.
    roofline: how long that takes.
  """

  mesh: dict[str, int]
  memory: Memory
  limit: float
  error: str
  necessary: flops.Flops
  executed: flops.Flops
  traffic: Traffic | None
  roofline: Roofline | None

  @property
  def fits(self) -> bool:
    """Whether the step can run."""
    return not self.error and self.memory.total <= self.limit

  @property
  def intensity(self) -> float | None:
    """Operations for each byte from or to memory."""
    if self.traffic is None:
      return None
    return self.executed.total / self.traffic.memory


def plan_step(
  stage: Stage,
  phase: Phase,
  topology: Topology,
  *,
  limit: float | None = None,
) -> StepPlan:
  """Plans a step of a stage; `prepare(topology)` comes first.

  Args:
    stage: what to plan, with the mesh to plan it on.
    phase: which of its steps.
    topology: the devices.
    limit: bytes of memory that a device has; None is what the chip has.

  Raises:
    ValueError: if the mesh does not fit the topology, or the batch the mesh.
  """
  mesh = _compile.make_mesh(topology, stage.mesh)
  given = step_arguments(stage, mesh)
  compiled = _compile.compile_step(stage, phase, mesh)
  kinds = memory(stage, given, mesh.shape, compiled.temporaries or 0.0)
  run_time = flops.run_time_of(stage)
  step = stage.train_steps()[phase]
  total = flops.count(step, *given, run_time=run_time)
  executed = flops.Flops(*(part / mesh.size for part in total))
  moved = None
  if compiled.text:
    moved = traffic(compiled.text, trips=run_time.trips)
    if topology.chip.platform == "gpu":
      # What a CPU's program moves says nothing of fused kernels.
      products = flops.moved(step, *given, run_time=run_time) / mesh.size
      state = kinds.parameters + kinds.optimizer + kinds.ema
      moved = dataclasses.replace(moved, memory=products + 2 * state)
  return StepPlan(
    mesh=dict(mesh.shape),
    memory=kinds,
    limit=topology.chip.memory if limit is None else limit,
    error=compiled.error,
    necessary=flops.step(stage, phase),
    executed=executed,
    traffic=moved,
    roofline=moved and _roofline(topology.chip, executed, moved),
  )


def _roofline(chip: Chip, executed: flops.Flops, moved: Traffic) -> Roofline:
  return Roofline(
    compute=executed.total / chip.peak,
    memory=moved.memory / chip.bandwidth,
    network=moved.sent / chip.interconnect,
  )


def as_json(plan: StepPlan) -> dict[str, Any]:
  """Returns a plan as JSON values."""
  moved, roofline = plan.traffic, plan.roofline
  return {
    "fits": plan.fits,
    "error": plan.error,
    "mesh": plan.mesh,
    "memory_bytes": plan.memory._asdict() | {"total": plan.memory.total},
    "limit_bytes": plan.limit,
    "necessary_flops": plan.necessary._asdict(),
    "executed_flops_per_device": plan.executed._asdict(),
    "memory_traffic_bytes": moved and moved.memory,
    "collectives": moved
    and {k: m._asdict() for k, m in moved.collectives.items()},
    "operations_per_byte": plan.intensity,
    "roofline_seconds": roofline
    and roofline._asdict() | {"step": roofline.step, "bound": roofline.bound},
  }
