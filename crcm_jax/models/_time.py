r"""Sinusoidal features of a time (SPEC section 1, "Time").

$$s(t) = [\cos(p\, w_0), \dots, \sin(p\, w_0), \dots], \quad p = 1000 t,\;
w_k = 10000^{-k / \mathrm{half}}.$$

The fastest feature turns by 1000 radians over t in [0, 1]: a relative rounding
of 2^-8 (bfloat16) is a wrong time by several units of p, and even float32 needs
`phases` to keep the digits that the features depend on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float
from crcm_jax.models._phases import phases

BASE = 10000.0


def sinusoid(
  t: Float[Array, "*times"],
  width: int,
  *,
  scale: float,
  bfloat16: bool = False,
) -> Float[Array, "*times {width}"]:
  """Returns the sinusoidal features of times, in the dtype of `t`.

  Args:
    t: times, float32 or float64.
    width: number of features, cosines first, then as many sines.
    scale: multiplies the times, 1000 for Wan.
    bfloat16: rounds the scaled times to bfloat16's 8 bits first.
  """
  half = width // 2
  rates = BASE ** (-np.arange(half) / half)  # w_k
  if bfloat16:
    angle = phases(round_to_bfloat16(scale * t), rates)
  else:
    angle = phases(t, scale * rates)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def round_to_bfloat16(p: Float[Array, "*times"]) -> Float[Array, "*times"]:
  """Rounds to 8 significant bits; the derivative is that of no rounding."""
  rounded = jax.lax.reduce_precision(p, exponent_bits=8, mantissa_bits=7)
  return p + jax.lax.stop_gradient(rounded - p)
