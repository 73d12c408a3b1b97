"""Consistency at two neighbouring times, joined by the teacher's ODE steps.

    P = f_params(x, t_0),   x <- x + (t_{k+1} - t_k) v_teacher(x, t_k),
    Q = f_target(x, t_N),   loss = (P - stop_gradient(Q))^2

with the data prediction `f(x, t) = x - t v(x, t)`. The TrigFlow form steps in
the angle, with `f(x, a) = cos(a) x - sin(a) F(x, a)`.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import _times, paths
from crcm_jax._times import expand, wide
from crcm_jax._typing import (
  Array,
  Float,
  Int,
  ParametricVelocity,
  Params,
  Velocity,
)
from crcm_jax.losses import _examples


class DiscreteConsistencyMetrics(NamedTuple):
  """What a discrete consistency loss measures, per example.

  Attributes:
    gap: root mean square of `P - Q`.
    dropped: 1 where data, teacher or target removed the example.
    student_non_finite: 1 where the student itself gave NaN or infinity.
  """

  gap: Float[Array, "b"]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


def discrete_consistency_loss(
  velocity: ParametricVelocity,
  params: Params,
  teacher: Velocity,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  times: Float[Array, "b *frames_steps"],
  *,
  target: Velocity | None = None,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], DiscreteConsistencyMetrics]:
  """Matches data predictions a few teacher steps apart (dCM).

      loss = sum over frames of the mean over a frame of (P - Q)^2

  The gradient flows through P alone. The loss is zero if the student's data
  prediction is constant along the teacher's Euler steps.

  Args:
    velocity: the student, `velocity(params, x_t, t)`.
    params: the parameters to differentiate.
    teacher: frozen velocity function whose ODE is followed, guidance included.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    times: `[b, *frames, steps + 1]`, decreasing along the last axis: where P
      is taken, each teacher step, and where Q is taken.
    target: frozen velocity function of Q (its own context noise, averaged
      weights); `None` is the student with its gradient stopped.
    frame_weight: weight of each frame, `[b, *frames]`; a frame with 0 is
      removed and does not move along the ODE.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, or concrete times are out of range
      or do not decrease.

  References:
    Song et al., Consistency Models, https://arxiv.org/abs/2303.01469
    Causal-rCM, https://arxiv.org/abs/2606.25473, equations (1) and (10).
  """
  t = _split_times("times", times, x_0, frame_weight)
  x_0, noise, t, clean = _clean(x_0, noise, t)
  x = paths.interpolate(x_0, noise, t[0])
  student = functools.partial(velocity, params)
  target = target or _stopped(velocity, params)
  p, q, keep = _predictions(
    student, teacher, target, x, t, clean, frame_weight, paths.data_prediction
  )
  gap = _examples.zero_examples(p - q, keep)
  per_frame = _examples.mean_over_features(jnp.square(gap), t[0])
  loss = _examples.weighted_sum(per_frame, frame_weight)
  return loss, _metrics(p, gap, keep, frame_weight)


def trigflow_discrete_consistency_loss(
  velocity: ParametricVelocity,
  params: Params,
  teacher: Velocity,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  angles: Float[Array, "b *frames_steps"],
  *,
  target: Velocity | None = None,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], DiscreteConsistencyMetrics]:
  """Matches data predictions a few TrigFlow teacher steps apart.

  The loss of bidirectional rCM: as `discrete_consistency_loss`, with Euler
  steps in the angle, and summed over everything.

  Args:
    velocity: the student's rectified-flow velocity function.
    params: the parameters to differentiate.
    teacher: frozen rectified-flow velocity function.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    angles: TrigFlow angles in [0, pi/2], `[b, *frames, steps + 1]`,
      decreasing along the last axis.
    target: frozen rectified-flow velocity function of the target.
    frame_weight: weight of each frame, `[b, *frames]`; 0 removes it.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, or concrete angles are out of range
      or do not decrease.

  References:
    rCM, https://arxiv.org/abs/2510.08431
  """
  a = _split_times("angles", angles, x_0, frame_weight, top=np.pi / 2)
  x_0, noise, a, clean = _clean(x_0, noise, a)
  x = paths.trigflow_interpolate(x_0, noise, a[0])
  student = paths.trigflow_velocity(functools.partial(velocity, params))
  target = target or _stopped(velocity, params)
  p, q, keep = _predictions(
    student,
    paths.trigflow_velocity(teacher),
    paths.trigflow_velocity(target),
    x,
    a,
    clean,
    frame_weight,
    paths.trigflow_data_prediction,
  )
  gap = _examples.zero_examples(p - q, keep)
  loss = _examples.weighted_sum(jnp.square(gap), frame_weight)
  return loss, _metrics(p, gap, keep, frame_weight)


def _predictions(
  student, teacher, target, x, times, clean, frame_weight, data_prediction
):
  """Returns the student's prediction P, the frozen Q, and who counts."""
  v = _examples.check_velocity(student(x, times[0]), x)
  p = data_prediction(x, v, times[0])
  end = _follow(teacher, x, times, frame_weight)
  v_end = _examples.check_velocity(target(end, times[-1]), x, "target")
  q = jax.lax.stop_gradient(data_prediction(end, v_end, times[-1]))
  return p, q, _examples.keep_examples(p, clean, q)


def _follow(teacher: Velocity, x, times, frame_weight) -> Array:
  """Takes the teacher's Euler steps along the times, without gradient."""
  moves = _examples.moving(times[0], frame_weight)
  for t, t_next in itertools.pairwise(times):
    v = _examples.check_velocity(teacher(x, t), x, "teacher")
    step = expand(moves * (t - t_next), x)
    x = (wide(x) - step * v).astype(x.dtype)
  return jax.lax.stop_gradient(x)


def _stopped(velocity: ParametricVelocity, params: Params) -> Velocity:
  """Returns the student with its gradient stopped."""
  return functools.partial(velocity, jax.lax.stop_gradient(params))


def _split_times(
  name: str, times: Array, x_0: Array, frame_weight, top: float = 1.0
) -> list[Array]:
  """Checks times `[b, *frames, steps + 1]` and returns one array a step."""
  split = [times[..., k] for k in range(times.shape[-1])]
  _times.check_prefix(f"{name}[..., 0]", split[0], x_0)
  _times.check_same_shape("frame_weight", frame_weight, split[0])
  _times.check_range(name, times, top)
  _times.check_decreasing(name, times, frame_weight)
  return split


def _clean(x_0: Array, noise: Array, times: list[Array]):
  """Zeroes the examples with a non-finite input in all arrays."""
  clean = _examples.finite_examples((x_0, noise, times))
  return *_examples.zero_examples((x_0, noise, times), clean), clean


def _metrics(p, gap, keep, frame_weight) -> DiscreteConsistencyMetrics:
  mean_square = _examples.weighted_mean(jnp.square(gap), frame_weight)
  return DiscreteConsistencyMetrics(
    gap=jnp.sqrt(jax.lax.stop_gradient(mean_square)),
    dropped=(~keep).astype(jnp.int32),
    student_non_finite=(~_examples.finite_examples(p)).astype(jnp.int32),
  )
