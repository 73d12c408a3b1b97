"""Regression of a velocity onto `noise - x_0`: diffusion training and critic.

    x_t = (1 - t) x_0 + t noise,    error = v(x_t, t) - (noise - x_0)

Teacher forcing and diffusion forcing differ in the velocity function (with
clean context or block-causal) and in the times (one a video, one a chunk),
not in the loss. The critic of distribution matching is the same regression on
the student's samples, reduced otherwise.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import _times, paths
from crcm_jax._times import wide
from crcm_jax._typing import Array, Float, Int, ParametricVelocity, Params
from crcm_jax.losses import _examples


class FlowMatchingMetrics(NamedTuple):
  """What a velocity regression measures, per example.

  Attributes:
    error: mean squared error of the velocity, without weights.
    dropped: 1 where bad data removed the example.
    student_non_finite: 1 where the network itself gave NaN or infinity.
  """

  error: Float[Array, "b"]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


def flow_matching_loss(
  velocity: ParametricVelocity,
  params: Params,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  *,
  weight: Float[Array, "b *frames"] | None = None,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], FlowMatchingMetrics]:
  """Regresses the velocity onto `noise - x_0`.

      loss = sum over frames of weight * mean over a frame of
             (v(x_t, t) - (noise - x_0))^2

  The gradient flows through `velocity(params, ...)` alone. The loss is zero
  where the velocity is exact for every draw, which only deterministic data
  allows; its minimum is the conditional mean.

  Args:
    velocity: `velocity(params, x_t, t)`, conditioning closed over.
    params: the parameters to differentiate.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    weight: loss weight of each time, such as `gaussian_bell_weight(t)`.
    frame_weight: weight of each frame; 0 removes it.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit or a concrete time is out of range.

  Example:
    >>> import jax.numpy as jnp
    >>> x_0, noise = jnp.zeros((2, 3)), jnp.ones((2, 3))
    >>> v = lambda params, x, t: params * jnp.ones_like(x)
    >>> flow_matching_loss(v, 0.5, x_0, noise, jnp.array([0.1, 0.9]))[0]
    Array([0.25, 0.25], dtype=float32)

  References:
    Lipman et al., Flow Matching for Generative Modeling,
    https://arxiv.org/abs/2210.02747
  """
  square, metrics = _squared_error(
    velocity, params, x_0, noise, t, frame_weight
  )
  per_frame = _examples.mean_over_features(square, t)
  per_frame = _times_weight(per_frame, weight)
  return _examples.weighted_sum(per_frame, frame_weight), metrics


def critic_loss(
  velocity: ParametricVelocity,
  params: Params,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  *,
  weight: Float[Array, "b *frames"] | None = None,
  frame_weight: Float[Array, "b *frames"] | None = None,
  reduction: Literal["mean", "sum"] = "mean",
) -> tuple[Float[Array, "b"], FlowMatchingMetrics]:
  """Trains the fake score on the student's samples.

  The flow-matching regression with the reference's reductions: the causal
  recipe averages everything (SPEC 8.5); the bidirectional TrigFlow recipe
  sums, `reduction="sum"` with `weight = 1 / (cos a + sin a)^2` at the angle
  a of each time (SPEC section 10).

  The gradient flows through `velocity(params, ...)` alone: the samples are
  stopped.

  Args:
    velocity: the fake score's velocity function.
    params: its parameters.
    x_0: samples of the student, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    weight: loss weight of each time.
    frame_weight: weight of each frame; 0 removes it.
    reduction: "mean" or "sum" over frames and features.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, a concrete time is out of range, or
      the reduction is unknown.
  """
  if reduction not in ("mean", "sum"):
    raise ValueError(f'`reduction` must be "mean" or "sum"; got {reduction!r}.')
  x_0 = jax.lax.stop_gradient(x_0)
  square, metrics = _squared_error(
    velocity, params, x_0, noise, t, frame_weight
  )
  square = _times_weight(square, weight)
  reduce = {"mean": _examples.weighted_mean, "sum": _examples.weighted_sum}
  return reduce[reduction](square, frame_weight), metrics


def gaussian_bell_weight(
  t: Float[Array, "*frames"],
) -> Float[Array, "*frames"]:
  """Returns `exp(-2 (t - 1/2)^2) - exp(-1/2)`: 0 at both ends of time.

  Written as `exp(-1/2) (exp(2 t (1 - t)) - 1)`, which keeps its digits there.
  """
  return math.exp(-0.5) * jnp.expm1(2 * t * (1 - t))


def _squared_error(
  velocity: ParametricVelocity,
  params: Params,
  x_0: Array,
  noise: Array,
  t: Array,
  frame_weight: Array | None,
) -> tuple[Array, FlowMatchingMetrics]:
  """Returns `(v - (noise - x_0))^2`, zero in examples with bad data."""
  _examples.check_arguments(x_0, t, frame_weight)
  x_0, noise, t, clean = _examples.clean_inputs(x_0, noise, t)
  x_t = paths.interpolate(x_0, noise, t)
  v = _examples.check_velocity(velocity(params, x_t, t), x_t)
  keep = _examples.keep_examples(v, clean)
  error = v - (wide(noise) - wide(x_0))
  square = jnp.square(_examples.zero_examples(error, keep))
  return square, FlowMatchingMetrics(
    error=_examples.weighted_mean(square, frame_weight),
    dropped=(~keep).astype(jnp.int32),
    student_non_finite=(~_examples.finite_examples(v)).astype(jnp.int32),
  )


def _times_weight(x: Array, weight: Array | None) -> Array:
  """Multiplies by an optional weight per time."""
  if weight is None:
    return x
  _times.check_prefix("weight", weight, x)
  return _times.expand(weight, x) * x
