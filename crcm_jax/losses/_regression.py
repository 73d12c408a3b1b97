"""Regression onto the end points of a teacher's ODE.

The initialisation of CausVid and Self-Forcing, and the baseline to beat: pairs
(noisy x_t on a trajectory, its end x_0) are made once with the teacher, and
the student's data prediction is fitted to them.

References:
  Yin et al., CausVid, https://arxiv.org/abs/2412.07772
"""

from typing import NamedTuple

import jax.numpy as jnp

from crcm_jax import paths
from crcm_jax._times import wide
from crcm_jax._typing import Array, Float, Int, ParametricVelocity, Params
from crcm_jax.losses import _examples


class RegressionMetrics(NamedTuple):
  """What the regression measures, per example.

  Attributes:
    error: mean squared error of the data prediction, without weights.
    dropped: 1 where bad data removed the example.
    student_non_finite: 1 where the network itself gave NaN or infinity.
  """

  error: Float[Array, "b"]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


def regression_loss(
  velocity: ParametricVelocity,
  params: Params,
  x_t: Float[Array, "b *shape"],
  x_0: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  *,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], RegressionMetrics]:
  """Fits the data prediction `x_t - t v(x_t, t)` to the trajectory's end.

      loss = sum over frames of the mean over a frame of (x_t - t v - x_0)^2

  The gradient flows through `velocity(params, ...)` alone. The loss is zero
  at the flow map of the teacher.

  Args:
    velocity: `velocity(params, x_t, t)`, conditioning closed over.
    params: the parameters to differentiate.
    x_t: points of the teacher's trajectories, `[b, *frames, *features]`.
    x_0: the end of each trajectory.
    t: rectified-flow times in [0, 1] of the points, one per frame.
    frame_weight: weight of each frame; 0 removes it.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit or a concrete time is out of range.
  """
  _examples.check_arguments(x_0, t, frame_weight)
  x_0, x_t, t, clean = _examples.clean_inputs(x_0, x_t, t)
  v = _examples.check_velocity(velocity(params, x_t, t), x_t)
  keep = _examples.keep_examples(v, clean)
  error = paths.data_prediction(x_t, v, t) - wide(x_0)
  square = jnp.square(_examples.zero_examples(error, keep))
  per_frame = _examples.mean_over_features(square, t)
  return _examples.weighted_sum(per_frame, frame_weight), RegressionMetrics(
    error=_examples.weighted_mean(square, frame_weight),
    dropped=(~keep).astype(jnp.int32),
    student_non_finite=(~_examples.finite_examples(v)).astype(jnp.int32),
  )
