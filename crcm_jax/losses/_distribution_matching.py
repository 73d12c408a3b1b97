"""Distribution matching: pull samples along a score difference (DMD).

With `x_t = (1 - t) x_0 + t noise` of a sample x_0, and the data predictions
f of the fake score and r of the real one at `(x_t, t)`,

    target = x_0 - (f - r) / max(mean |x_0 - r|, 1e-5)      (frozen)
    loss = sum of (x_0 - target)^2.

`f - r = t^2 / (1 - t) (score_fake - score_real)`, so the gradient descends
the Kullback-Leibler divergence between the diffused samples and the diffused
data. Both differences are taken of velocities, where x_t has cancelled:

    f - r = t (v_real - v_fake),    x_0 - r = t (v_real - (noise - x_0)).

The target is a function of its own, because a rollout too long to
differentiate at once is replayed against it.

References:
  Yin et al., Improved Distribution Matching Distillation,
  https://arxiv.org/abs/2405.14867
  Huang et al., Self Forcing, https://arxiv.org/abs/2506.08009
  Causal-rCM, https://arxiv.org/abs/2606.25473, equation (7)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import paths
from crcm_jax._times import expand, wide
from crcm_jax._typing import Array, Float, Int, Velocity
from crcm_jax.losses import _examples

SMALLEST_SCALE = 1e-5


class DistributionMatchingMetrics(NamedTuple):
  """What distribution matching measures, per example.

  Attributes:
    gradient_norm: norm of `(f - r) / scale`, half the loss's gradient.
    scale: `max(mean |x_0 - r|, 1e-5)`.
    dropped: 1 where the noise or a score removed the example.
    student_non_finite: 1 where the sample itself is not finite.
  """

  gradient_norm: Float[Array, "b"]
  scale: Float[Array, "b"]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


def distribution_matching_loss(
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  real: Velocity,
  fake: Velocity,
  *,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], DistributionMatchingMetrics]:
  """Moves differentiable samples from the fake score to the real one.

  The value is the squared norm of the score difference, the gradient in x_0
  is `2 (f - r) / scale`. It is zero where both scores agree.

  Args:
    x_0: samples, `[b, *frames, *features]`, which carry the gradient.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    real: frozen velocity function of the data's diffusion, with guidance.
    fake: frozen velocity function of the samples' diffusion.
    frame_weight: weight of each frame; 0 removes it.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit or a concrete time is out of range.
  """
  target, metrics = distribution_matching_target(
    x_0, noise, t, real, fake, frame_weight=frame_weight
  )
  return target_matching_loss(x_0, target, frame_weight=frame_weight), metrics


def distribution_matching_target(
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  real: Velocity,
  fake: Velocity,
  *,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b *shape"], DistributionMatchingMetrics]:
  """Returns where distribution matching wants the samples, without gradient.

  Args:
    x_0: samples, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    real: frozen velocity function of the data's diffusion, with guidance.
    fake: frozen velocity function of the samples' diffusion.
    frame_weight: weight of each frame in the scale.

  Returns:
    The target, in at least float32, and metrics. An example that a non-finite
    score or noise removed has a target of NaN, which `target_matching_loss`
    counts as no loss and no gradient, in every part of the replay.

  Raises:
    ValueError: if a shape does not fit or a concrete time is out of range.
  """
  _examples.check_arguments(x_0, t, frame_weight)
  x_0 = jax.lax.stop_gradient(x_0)
  student_finite = _examples.finite_examples(x_0)
  x_t = paths.interpolate(x_0, noise, t)
  v_fake, v_real = (
    _examples.check_velocity(v, x_t, name)
    for v, name in ((fake(x_t, t), "fake"), (real(x_t, t), "real"))
  )
  time = expand(t, x_t)
  error = time * jnp.abs(v_real - (wide(noise) - wide(x_0)))
  distance = _examples.weighted_mean(error, frame_weight)
  scale = jnp.maximum(distance, SMALLEST_SCALE)
  direction = time * (v_real - v_fake) / expand(scale, x_0)

  keep = _examples.finite_examples(direction)
  target = wide(x_0) - direction
  target = jnp.where(expand(keep.astype(t.dtype), x_0) > 0, target, jnp.nan)
  direction, scale = _examples.zero_examples((direction, scale), keep)
  metrics = DistributionMatchingMetrics(
    gradient_norm=_examples.norm(direction, frame_weight),
    scale=scale,
    dropped=(student_finite & ~keep).astype(jnp.int32),
    student_non_finite=(~student_finite).astype(jnp.int32),
  )
  return jax.lax.stop_gradient((target, metrics))


def target_matching_loss(
  x_0: Float[Array, "b *shape"],
  target: Float[Array, "b *shape"],
  *,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> Float[Array, "b"]:
  """Returns the squared distance to a frozen target, summed over everything.

  The replay of self-forcing: applied to all chunks at once or to each chunk
  and its part of the target, the gradients add up to those of
  `distribution_matching_loss`.

  Args:
    x_0: samples, which carry the gradient.
    target: from `distribution_matching_target`; a non-finite one removes its
      example.
    frame_weight: weight of each frame; 0 removes it.

  Returns:
    The loss of each example.
  """
  target = jax.lax.stop_gradient(target)
  clean = _examples.finite_examples(target)
  keep = _examples.keep_examples(x_0, clean)
  distance = _examples.zero_examples(wide(x_0) - wide(target), keep)
  return _examples.weighted_sum(jnp.square(distance), frame_weight)
