"""A plan as text."""

from collections.abc import Iterator, Mapping

from crcm_jax.training import sharding
from crcm_jax.training._stages import Phase, Stage
from crcm_jax.training.plan._chips import Topology
from crcm_jax.training.plan._plan import StepPlan
from crcm_jax.training.plan._suggest import Change

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_DECIMAL = ("", "k", "M", "G", "T", "P", "E")


def report(
  stage: Stage,
  phase: Phase,
  topology: Topology,
  plan: StepPlan,
  change: Change | None = None,
) -> str:
  """Returns a plan as text.

  Args:
    stage: what was planned.
    phase: which of its steps.
    topology: for which devices.
    plan: the plan.
    change: what makes it fit; None if it fits, or if nothing was found.
  """
  how = "compiled by libtpu"
  if topology.chip.platform != "tpu":
    how = f"estimate: compiled for {topology.devices} fake CPU device(s)"
  lines = [
    f"{stage.name}: {phase} step on {topology.name}, {_mesh(stage.mesh)}",
    f"  ({how}; all numbers are of one device)",
    *_memory(plan),
    *_operations(plan, topology),
    *_traffic(plan),
    *_roofline(plan, topology),
  ]
  if not plan.fits:
    lines.extend(_change(stage, change))
  return "\n".join(lines)


def size(n: float) -> str:
  """Returns bytes in the unit that suits them.

  Example:
    >>> size(1536.0)
    '1.50 KiB'
  """
  power = 0
  while n >= 1024 and power < len(_BINARY) - 1:
    n, power = n / 1024, power + 1
  return f"{n:.2f} {_BINARY[power]}"


def decimal(n: float, unit: str) -> str:
  """Returns a number with a decimal prefix.

  Example:
    >>> decimal(2.5e12, "FLOP")
    '2.50 TFLOP'
  """
  power = 0
  while n >= 1000 and power < len(_DECIMAL) - 1:
    n, power = n / 1000, power + 1
  return f"{n:.2f} {_DECIMAL[power]}{unit}"


def _line(name: str, value: str, more: str = "") -> str:
  return f"    {name:20}{value:>14}{more}"


def _memory(plan: StepPlan) -> Iterator[str]:
  yield "  memory"
  for kind, n in plan.memory._asdict().items():
    if n:
      yield _line(kind, size(n))
  verdict = "fits" if plan.fits else "DOES NOT FIT"
  of = f" of {size(plan.limit)}: {verdict}"
  yield _line("total", size(plan.memory.total), of)
  if plan.error:
    yield f"    {plan.error}"


def _operations(plan: StepPlan, topology: Topology) -> Iterator[str]:
  yield "  operations"
  yield _line("products", decimal(plan.executed.matmul, "FLOP"))
  yield _line("attention", decimal(plan.executed.attention, "FLOP"))
  necessary = plan.necessary.total / topology.devices
  share = 100 * necessary / plan.executed.total
  yield _line("necessary", decimal(necessary, "FLOP"), f", {share:.0f} %")


def _traffic(plan: StepPlan) -> Iterator[str]:
  if plan.traffic is None:
    return
  yield "  collectives"
  if not plan.traffic.collectives:
    yield "    none"
  for kind, moved in sorted(plan.traffic.collectives.items()):
    yield _line(kind, decimal(moved.bytes, "B"), f" in {moved.count:.0f}")


def _roofline(plan: StepPlan, topology: Topology) -> Iterator[str]:
  if plan.traffic is None or plan.roofline is None:
    return
  parts, chip = plan.roofline, topology.chip
  yield "  roofline"
  yield _line("compute", _seconds(parts.compute), f" at {_rate(chip.peak)}")
  yield _line(
    "memory",
    _seconds(parts.memory),
    f" for {decimal(plan.traffic.memory, 'B')}, {plan.intensity:.1f}"
    f" operations a byte (the chip's: {chip.peak / chip.bandwidth:.0f})",
  )
  yield _line(
    "network",
    _seconds(parts.network),
    f" for {decimal(plan.traffic.sent, 'B')}",
  )
  necessary = plan.necessary.total / topology.devices
  most = 100 * necessary / chip.peak / parts.step
  yield _line(
    "step at least",
    _seconds(parts.step),
    f", bound by {parts.bound}; utilisation at most {most:.0f} %",
  )


def _seconds(seconds: float) -> str:
  return f"{seconds:.3f} s" if seconds >= 1 else f"{1e3 * seconds:.3f} ms"


def _rate(peak: float) -> str:
  return decimal(peak, "FLOP/s")


def _change(stage: Stage, change: Change | None) -> Iterator[str]:
  if change is None:
    yield "  No change of remat, fsdp or context was found to make it fit."
    return
  settings = []
  if change.remat != stage.config["network"].get("remat"):
    settings.append(f"network.remat={change.remat!r}")
  settings += [
    f"mesh.{axis}={n}"
    for axis, n in change.mesh.items()
    if n != stage.mesh.get(axis, 1)
  ]
  yield f"  smallest change that should make it fit: {', '.join(settings)}"
  yield (
    f"    then about {size(change.memory.total)} a device,"
    f" {size(change.memory.activations)} of it activations (estimate)"
  )


def _mesh(mesh: Mapping[str, int]) -> str:
  split = [f"{a}={mesh[a]}" for a in sharding.AXES if mesh.get(a, 1) > 1]
  return f"mesh {', '.join(split)}" if split else "one device"
