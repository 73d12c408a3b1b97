"""Networks as the velocity functions that losses take."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from crcm_jax import guidance
from crcm_jax._typing import Array, ParametricVelocity, Params, Velocity
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training.objectives import _inputs


def bidirectional(network: Any, condition: Any) -> ParametricVelocity:
  """Returns `v(params, x, t)` in which every frame sees every frame."""
  return lambda params, x, t: network.apply({"params": params}, x, t, condition)


def block_causal(
  network: Any, condition: Any, pattern: ChunkPattern
) -> ParametricVelocity:
  """Returns `v(params, x, t)` in which frames see no later chunk."""
  return lambda params, x, t: network.apply(
    {"params": params}, x, t, condition, pattern=pattern
  )


def teacher_forcing(
  network: Any,
  condition: Any,
  pattern: ChunkPattern,
  context: Array,
  context_t: Array | None = None,
) -> ParametricVelocity:
  """Returns `v(params, x, t)` in which chunks see the context's past."""
  return lambda params, x, t: network.apply(
    {"params": params},
    x,
    t,
    condition,
    pattern=pattern,
    context=context,
    context_t=context_t,
  )


def mean_velocity(
  network: Any,
  condition: Any,
  pattern: ChunkPattern,
  context: Array,
  context_t: Array | None = None,
) -> Callable[[Params, Array, Array, Array], Array]:
  """Returns `u(params, x, t, end_time)` in which chunks see the past."""
  return lambda params, x, t, end_time: network.apply(
    {"params": params},
    x,
    t,
    condition,
    pattern=pattern,
    context=context,
    context_t=context_t,
    end_time=end_time,
  )


def causal_teacher(
  network: Any,
  params: Params,
  inputs: _inputs.Inputs,
  pattern: ChunkPattern,
  scale: float,
) -> Velocity:
  """Returns a causal teacher that sees the clean past, with guidance."""
  return guided_teacher(
    lambda condition: teacher_forcing(
      network, condition, pattern, inputs.history
    ),
    params,
    inputs.condition,
    inputs.null_condition,
    scale,
  )


def bidirectional_teacher(
  network: Any, params: Params, inputs: _inputs.Inputs, scale: float
) -> Velocity:
  """Returns a teacher in which every frame sees every frame, with guidance."""
  return guided_teacher(
    functools.partial(bidirectional, network),
    params,
    inputs.condition,
    inputs.null_condition,
    scale,
  )


def guided_teacher(
  velocity: Callable[[Any], ParametricVelocity],
  params: Params,
  condition: Any,
  null_condition: Any,
  scale: float,
) -> Velocity:
  """Returns a frozen teacher with classifier-free guidance.

  Args:
    velocity: `velocity(condition)` is the network under a condition.
    params: the teacher's parameters.
    condition: the captions.
    null_condition: no caption, of the same shape.
    scale: guidance scale; 1 means none.
  """
  params = jax.lax.stop_gradient(params)
  return guidance.classifier_free(
    functools.partial(velocity(condition), params),
    functools.partial(velocity(null_condition), params),
    scale,
  )
