r"""Sinusoidal features of a time (SPEC section 1, "Time").

$$s(t) = [\cos(p\, w_0), \dots, \sin(p\, w_0), \dots], \quad p = 1000 t,\;
w_k = 10000^{-k / \mathrm{half}}.$$

The fastest feature turns by 1000 radians over t in [0, 1], so a relative
rounding of 2^-8 (bfloat16) is a wrong time by several units of p; float32
leaves an angle error below 1e-4, and float64 times stay float64.
"""

import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float

BASE = 10000.0


def sinusoid(
  t: Float[Array, "*times"], width: int, *, scale: float
) -> Float[Array, "*times {width}"]:
  """Returns the sinusoidal features of times, in the dtype of `t`.

  Args:
    t: times, float32 or float64.
    width: number of features, cosines first, then as many sines.
    scale: multiplies the times, 1000 for Wan.
  """
  half = width // 2
  rates = jnp.asarray(BASE ** (-np.arange(half) / half), t.dtype)  # w_k
  angle = (scale * t)[..., None] * rates.reshape((1,) * t.ndim + (half,))
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
