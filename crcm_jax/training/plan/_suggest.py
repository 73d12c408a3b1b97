"""The smallest change with which a step fits.

Nothing is compiled: the memory of state and batch follows from shapes, and
activations are scaled. With R the bytes that the backward pass finds saved (the
residuals of `jax.vjp`) and n the devices among which tokens are split,

    temporaries' = R' / n' + (temporaries - R / n) n / n'.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from crcm_jax.models import REMAT_POLICIES
from crcm_jax.training import sharding
from crcm_jax.training._arguments import step_arguments, StepArguments
from crcm_jax.training._stages import Phase, read_stage, Stage
from crcm_jax.training._state import TrainState
from crcm_jax.training.plan._memory import Memory, memory
from crcm_jax.training.plan._plan import StepPlan

REMAT = (None, *reversed(REMAT_POLICIES))
"""Policies, from what saves the most to what saves the least."""

_MOST_DOUBLINGS = 6


class Change(NamedTuple):
  """What to do differently, and what is expected of it.

  Attributes:
    remat: the remat policy.
    mesh: devices along each axis.
    memory: the estimate of a device's memory.
  """

  remat: str | None
  mesh: Mapping[str, int]
  memory: Memory


def suggest(stage: Stage, phase: Phase, plan: StepPlan) -> Change | None:
  """Returns the smallest change with which a step should fit, or None.

  Tried are, in this order: other remat policies; more devices along `fsdp`, at
  the cost of `data`; both; then, with the policy "full", twice as many devices
  along `fsdp`, or where the batch does not divide, `context`, and so on.

  Args:
    stage: what was planned.
    phase: which of its steps.
    plan: that did not fit.
  """
  saved = functools.cache(lambda remat: saved_bytes(stage, phase, remat))
  now = stage.config["network"].get("remat")
  before = plan.memory.cache + plan.memory.activations
  tokens = _token_devices(plan.mesh)
  rest = max(0.0, before * tokens - saved(now))
  for remat, mesh in _changes(stage, plan.mesh, now):
    changed = with_changes(stage, remat, mesh)
    abstract = AbstractMesh(
      tuple(mesh[axis] for axis in sharding.AXES), sharding.AXES
    )
    temporaries = (saved(remat) + rest) / _token_devices(mesh)
    try:
      given = _checked_arguments(changed, abstract)
    except ValueError:  # Something does not divide by so many devices.
      continue
    found = memory(changed, given, abstract.shape, temporaries)
    if found.total <= plan.limit:
      return Change(remat, mesh, found)
  return None


def _checked_arguments(stage: Stage, mesh: AbstractMesh) -> StepArguments:
  """Returns what the stage's steps take, if a mesh divides all of it."""
  video = stage.dataset.shapes().x_0.shape
  for network in (stage.model, *stage.networks.values()):
    sharding.check_stage(mesh.shape, network.config, video)
  return step_arguments(stage, mesh)


def with_changes(
  stage: Stage, remat: str | None, mesh: Mapping[str, int]
) -> Stage:
  """Returns a stage with another remat policy, on another mesh."""
  config = dict(stage.config)
  config.pop("stage")
  config["network"] = config["network"] | {"remat": remat}
  config["mesh"] = dict(mesh)
  return read_stage(stage.name, config, stage.stages)


def saved_bytes(stage: Stage, phase: Phase, remat: str | None) -> float:
  """Returns what the backward pass finds saved, of all devices together.

  Of a batch in parts, one part is saved at a time.
  """
  stage = with_changes(stage, remat, stage.mesh)
  objective = stage.objectives[phase]

  def residuals(state: Any, frozen: Any, batch: Any, key: Any) -> Any:
    counters = stage.alternation.counters(state.step)
    draws = objective.draws(key, batch, counters)
    trained, frozen = _roles(phase, state, frozen)

    def loss(params: Any) -> Any:
      losses, _ = objective.loss(params, frozen, batch, draws, counters)
      return jnp.mean(losses)

    return jax.vjp(loss, trained)[1]

  saved = jax.eval_shape(
    residuals,
    stage.state_shapes(),
    stage.frozen_shapes(),
    stage.dataset.shapes(),
    jax.eval_shape(stage.run_key),
  )
  sizes = [a.size * a.dtype.itemsize for a in jax.tree.leaves(saved)]
  return sum(sizes) / stage.loop.micro_batches


def _roles(phase: Phase, state: TrainState, frozen: Any) -> tuple[Any, Any]:
  """Returns the parameters that a phase trains, and those it does not."""
  if phase == "critic":
    return state.fake, frozen | {"student": state.student}
  if state.fake is None:
    return state.student, frozen
  return state.student, frozen | {"fake": state.fake}


def _changes(
  stage: Stage, mesh: dict[str, int], now: str | None
) -> Iterator[tuple[str | None, dict[str, int]]]:
  """Lists changes, small ones first."""
  policies = REMAT[REMAT.index(now) + 1 :]
  moved = [_move(mesh, n) for n in _doublings(mesh["data"])]
  yield from ((remat, mesh) for remat in policies)
  yield from ((now, more) for more in moved)
  yield from ((remat, more) for more in moved for remat in policies)
  examples = stage.dataset.shapes().x_0.shape[0]
  larger = (moved or [mesh])[-1]
  for _ in range(_MOST_DOUBLINGS):
    shards = larger["data"] * larger["fsdp"]
    axis = "context" if examples % (2 * shards) else "fsdp"
    larger = larger | {axis: 2 * larger[axis]}
    yield "full", larger


def _doublings(data: int) -> list[int]:
  """The factors 2, 4, 8, ... of the devices along `data`."""
  return [2**i for i in range(1, data.bit_length()) if data % 2**i == 0]


def _move(mesh: Mapping[str, int], n: int) -> dict[str, int]:
  return {**mesh, "data": mesh["data"] // n, "fsdp": mesh["fsdp"] * n}


def _token_devices(mesh: Mapping[str, int]) -> int:
  return math.prod(mesh[axis] for axis in ("data", "fsdp", "context"))
