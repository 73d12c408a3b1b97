r"""Products of a position or a time with a rate, modulo a full turn.

The angle $x r$ may be thousands of radians, of which float32 keeps seven
digits: too few for its cosine. Counted in turns, $x r / 2 \pi = x c$, whole
turns can be dropped exactly. With x and c cut to their 12 leading bits, the
product of the leading parts has no rounding error in float32, and the rest is
small:

$$x c = x_h c_h + (x_h c_l + x_l c).$$
"""

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float

_BITS = 12


def phases(
  x: Float[Array, "*shape"], rates: Float[np.ndarray, " rates"]
) -> Float[Array, "*shape rates"]:
  """Returns `x * rate` up to multiples of 2 pi, for the sine and cosine of it.

  Accurate to a few units in the last place of a full turn, whatever the size
  of the product; differentiable in `x`.

  Args:
    x: positions or times, float32 or float64.
    rates: radians a unit of `x`, known on the host.
  """
  turns = np.asarray(rates, np.float64) / (2 * np.pi)
  turns_high = _leading(turns)
  x = x[..., None]
  cast = lambda a: jnp.asarray(a, x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
  # Its derivative is carried by `x_low`.
  x_high = jax.lax.stop_gradient(jax.lax.reduce_precision(x, 8, _BITS - 1))
  x_low = x - x_high
  whole = x_high * cast(turns_high)
  rest = x_high * cast(turns - turns_high) + x_low * cast(turns)
  return 2 * np.pi * (whole - jnp.round(whole) + rest)


def _leading(a: np.ndarray) -> np.ndarray:
  """Returns the 12 leading bits of each number."""
  fraction, exponent = np.frexp(a)
  return np.ldexp(np.round(np.ldexp(fraction, _BITS)), exponent - _BITS)
