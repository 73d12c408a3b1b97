"""Few-step sampling with a consistency model: denoise, add noise, repeat.

    x <- t_0 noise
    x <- (1 - t') f(x, t) + t' fresh noise,    f(x, t) = x - t v(x, t)

References:
  Song et al., Consistency Models, https://arxiv.org/abs/2303.01469
"""

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import _times, paths
from crcm_jax._times import wide
from crcm_jax._typing import Array, Float, Velocity


def consistency_sample(
  velocity: Velocity,
  noise: Float[Array, "b *shape"],
  times: Float[np.ndarray, "times"] | Float[Array, "times"],
  step_noise: Float[Array, "between b *shape"],
  *,
  initial_scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "b *shape"]:
  """Samples in a few steps, with fresh noise between them.

  Args:
    velocity: `velocity(x_t, t)` with t of shape `[b]`.
    noise: the standard normal draw to start from.
    times: decreasing times that end at 0; `few_step_schedule` makes them.
    step_noise: one standard normal draw for each time between the first and
      the last, `[len(times) - 2, b, ...]`.
    initial_scale: factor of `noise` at the first time t_0; None is t_0 itself.
      A sampler in TrigFlow angles starts at `x_a = noise`, which is
      `1 / (cos a_0 + sin a_0)`.

  Returns:
    The samples, in at least float32.

  Raises:
    ValueError: if the times do not decrease from at most 1 to 0, or the number
      of draws does not fit them.
  """
  times = np.asarray(times, np.float64)
  _times.check_decreasing("times", times)
  _times.check_range("times", times)
  if times[-1] != 0:
    raise ValueError(f"`times` must end at 0, at data; got {times.tolist()}.")
  if step_noise.shape[0] != len(times) - 2:
    raise ValueError(
      f"`step_noise` must hold one draw for each of the {len(times) - 2} times"
      f" between the first and the last; got {step_noise.shape[0]}."
    )
  noise, step_noise = wide(noise), wide(step_noise)
  last = jnp.zeros_like(noise)[None]  # multiplied by t' = 0

  def step(x, inputs):
    t, t_next, fresh = inputs
    t = jnp.broadcast_to(t, x.shape[:1])
    x_0 = paths.data_prediction(x, wide(velocity(x, t)), t)
    return (1 - t_next) * x_0 + t_next * fresh, None

  t = jnp.asarray(times, noise.dtype)
  fresh = jnp.concatenate([step_noise, last])
  scale = t[0] if initial_scale is None else jnp.asarray(initial_scale, t.dtype)
  x, _ = jax.lax.scan(step, scale * noise, (t[:-1], t[1:], fresh))
  return x
