"""Two ways from data to noise, and the maps between them.

Rectified flow, with a time t in [0, 1]:

    x_t = (1 - t) x_0 + t noise        velocity v = noise - x_0
    data prediction x_0 = x_t - t v

TrigFlow, with an angle a in [0, pi/2]:

    x_a = cos(a) x_0 + sin(a) noise    velocity F = cos(a) noise - sin(a) x_0
    data prediction x_0 = cos(a) x_a - sin(a) F

Both are one path seen at two scales: with Z = cos a + sin a and t = sin a / Z,
x_a = Z x_t. Networks of this library predict the rectified-flow velocity; the
TrigFlow losses wrap them with `trigflow_velocity`.

References:
  Liu et al., Flow Straight and Fast, https://arxiv.org/abs/2209.03003
  Lu and Song, Simplifying, Stabilizing and Scaling Continuous-Time
  Consistency Models, https://arxiv.org/abs/2410.11081
"""

from collections.abc import Callable

import jax.numpy as jnp

from crcm_jax._times import expand, wide
from crcm_jax._typing import Array, Float, Velocity


def interpolate(
  x_0: Float[Array, "*shape"],
  noise: Float[Array, "*shape"],
  t: Float[Array, "*frames"],
) -> Float[Array, "*shape"]:
  """Mixes data and noise: `x_t = (1 - t) x_0 + t noise`.

  Args:
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], `[b, *frames]`.

  Returns:
    The noisy data in the dtype of `x_0`, computed in at least float32.

  Raises:
    ValueError: if data and noise differ in shape.

  Example:
    >>> import jax.numpy as jnp
    >>> interpolate(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([0.25]))
    Array([[0.25, 0.25]], dtype=float32)
  """
  _check_noise(noise, x_0)
  time = expand(t, x_0)
  x_t = (1 - time) * wide(x_0) + time * wide(noise)
  return x_t.astype(x_0.dtype)


def data_prediction(
  x_t: Float[Array, "*shape"],
  v: Float[Array, "*shape"],
  t: Float[Array, "*frames"],
) -> Float[Array, "*shape"]:
  """Returns the data that a velocity points at: `x_0 = x_t - t v`.

  Args:
    x_t: noisy data, `[b, *frames, *features]`.
    v: rectified-flow velocity at `(x_t, t)`.
    t: rectified-flow times, `[b, *frames]`.

  Returns:
    The data prediction in at least float32.
  """
  return wide(x_t) - expand(t, x_t) * wide(v)


def angle_from_time(t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Returns the TrigFlow angle `a = atan(t / (1 - t))`, exact at t = 1."""
  return jnp.arctan2(t, 1 - t)


def time_from_angle(angle: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Returns the rectified-flow time `t = sin a / (cos a + sin a)`."""
  return jnp.sin(angle) / (jnp.cos(angle) + jnp.sin(angle))


def shift_time(
  t: Float[Array, "*shape"], shift: float
) -> Float[Array, "*shape"]:
  """Moves times towards noise: `k t / (1 + (k - 1) t)` for `k = shift`.

  `shift_time(., 1 / k)` inverts `shift_time(., k)`.

  Args:
    t: rectified-flow times in [0, 1].
    shift: a positive factor; 1 changes nothing.

  Returns:
    The shifted times; 0 and 1 stay.

  Raises:
    ValueError: if the shift is not positive.
  """
  if shift <= 0:
    raise ValueError(f"`shift` must be positive, 1 for no shift; got {shift}.")
  return shift * t / (1 + (shift - 1) * t)


def trigflow_interpolate(
  x_0: Float[Array, "*shape"],
  noise: Float[Array, "*shape"],
  angle: Float[Array, "*frames"],
) -> Float[Array, "*shape"]:
  """Mixes data and noise on the circle: `x_a = cos(a) x_0 + sin(a) noise`.

  Args:
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    angle: TrigFlow angles in [0, pi/2], `[b, *frames]`.

  Returns:
    The noisy data in the dtype of `x_0`, computed in at least float32.

  Raises:
    ValueError: if data and noise differ in shape.
  """
  _check_noise(noise, x_0)
  a = expand(angle, x_0)
  x_a = jnp.cos(a) * wide(x_0) + jnp.sin(a) * wide(noise)
  return x_a.astype(x_0.dtype)


def trigflow_data_prediction(
  x_a: Float[Array, "*shape"],
  f: Float[Array, "*shape"],
  angle: Float[Array, "*frames"],
) -> Float[Array, "*shape"]:
  """Returns the data a TrigFlow velocity points at: `cos(a) x_a - sin(a) F`."""
  a = expand(angle, x_a)
  return jnp.cos(a) * wide(x_a) - jnp.sin(a) * wide(f)


def trigflow_velocity(velocity: Velocity) -> Callable[[Array, Array], Array]:
  """Turns a rectified-flow velocity function into a TrigFlow one.

  With `Z = cos a + sin a`, `t = sin a / Z` and `x_t = x_a / Z`,

      F(x_a, a) = (cos a - sin a) x_t + v(x_t, t) / Z,

  which has the data prediction of `v`, and no division by `sin a`.

  Args:
    velocity: rectified-flow velocity function, `velocity(x_t, t)`.

  Returns:
    The TrigFlow velocity function, `F(x_a, angle)`, in at least float32.

  References:
    Causal-rCM, https://arxiv.org/abs/2606.25473, appendix A.
  """

  def trigflow(x_a: Array, angle: Array) -> Array:
    a = expand(angle, x_a)
    z = jnp.cos(a) + jnp.sin(a)
    x_t = wide(x_a) / z
    v = velocity(x_t.astype(x_a.dtype), time_from_angle(angle))
    return (jnp.cos(a) - jnp.sin(a)) * x_t + wide(v) / z

  return trigflow


def _check_noise(noise: Array, x_0: Array) -> None:
  """Checks that noise is not broadcast, and so shared, in silence."""
  if noise.shape != x_0.shape:
    raise ValueError(
      f"`noise` must have the shape of `x_0`, {x_0.shape}, one draw for each"
      f" number; got {noise.shape}."
    )
