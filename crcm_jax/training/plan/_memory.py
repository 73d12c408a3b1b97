"""What lies in one device's memory during a step, by kind."""

import math
from typing import Any, NamedTuple

import jax

from crcm_jax.models import WanChunks
from crcm_jax.training import _networks
from crcm_jax.training._arguments import StepArguments
from crcm_jax.training._stages import Stage
from crcm_jax.training.sharding import device_bytes


class Memory(NamedTuple):
  """Bytes on one device.

  Attributes:
    parameters: of the networks that are trained, student and fake score.
    optimizer: their moments.
    ema: the student's moving average.
    frozen: parameters of the teachers.
    batch: examples and prompts.
    cache: keys and values of a rollout.
    activations: all other temporaries, gradients among them.
  """

  parameters: float
  optimizer: float
  ema: float
  frozen: float
  batch: float
  cache: float
  activations: float

  @property
  def total(self) -> float:
    """All together."""
    return float(sum(self))


def memory(
  stage: Stage, given: StepArguments, shape: Any, temporaries: float
) -> Memory:
  """Sorts the memory of a step.

  Args:
    stage: whose step it is.
    given: the step's arguments with their shardings.
    shape: devices along each axis of the mesh.
    temporaries: bytes a device beside the arguments.
  """
  state = given.state
  # A cache is a temporary; along context it is whole (`sharding.Placement`).
  whole = 1 if stage.loop.lean_rollouts else shape["context"]
  parts = math.prod(shape.values()) / whole
  cache = min(temporaries, cache_bytes(stage) / parts)
  return Memory(
    parameters=device_bytes((state.student, state.fake)),
    optimizer=device_bytes((state.student_opt_state, state.fake_opt_state)),
    ema=device_bytes(state.ema),
    frozen=device_bytes(given.frozen),
    batch=device_bytes(given.batch),
    cache=cache,
    activations=temporaries - cache,
  )


def cache_bytes(stage: Stage) -> float:
  """Returns the size of the keys and values that a stage's rollouts keep."""
  if not stage.kind.critic:
    return 0.0
  batch = stage.dataset.shapes()
  b, frames, height, width, _ = batch.x_0.shape

  def fresh(params: Any, text: Any) -> Any:
    chunks = WanChunks(stage.model, text, height=height, width=width)
    return chunks.init(params, b, frames)

  params = _networks.param_shapes(stage.model)
  cache = jax.eval_shape(fresh, params, batch.condition)
  return float(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)))
