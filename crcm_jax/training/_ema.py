"""Moving average of the parameters with a power-law profile.

At the student's update number i (from 0) the average becomes

  ema <- beta_i ema + (1 - beta_i) params,  beta_i = (1 - 1/(i+1))^(gamma+1),

so that its memory grows with the training: after i updates it weighs the past
like s^gamma over a width of the fraction `rate` of it all. At i = 0 it copies
the parameters.

References:
  Karras et al., Analyzing and improving the training dynamics of diffusion
  models, arXiv 2312.02696, equations 2, 3 and algorithm 2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float, Int, Params


def ema_exponent(rate: float) -> float:
  """Returns gamma of the power profile whose relative width is `rate`.

  It is the largest real root of
  x^3 + 7 x^2 + (16 - rate^-2) x + (12 - rate^-2).

  Args:
    rate: standard deviation of the profile as a fraction of the training
      done, in (0, 1/sqrt(12)].

  Raises:
    ValueError: if no exponent of at least 0 has this width.

  Example:
    >>> round(ema_exponent(0.1), 4)
    6.9372
  """
  inverse = float(rate) ** -2
  roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
  gamma = float(np.max(roots[np.abs(roots.imag) < 1e-9].real))
  if gamma < 0:
    raise ValueError(
      "`rate` must lie in (0, 0.288], where a power profile has that width; "
      f"got {rate}. 0.1 is usual."
    )
  return gamma


def ema_beta(
  update: Int[Array, ""], exponent: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Returns (beta, 1 - beta) of an update, both to full relative precision.

  Args:
    update: number i of the update, from 0.
    exponent: gamma, from `ema_exponent`.
  """
  # 1 - beta is tiny late in a training: expm1 keeps its digits in float32.
  i = jnp.asarray(update, jnp.result_type(float))
  log_beta = (exponent + 1.0) * jnp.log1p(-1.0 / (i + 1.0))
  return jnp.exp(log_beta), -jnp.expm1(log_beta)


def ema_update(
  ema: Params, params: Params, update: Int[Array, ""], exponent: float
) -> Params:
  """Returns the moving average after one more update.

  Args:
    ema: the average so far, float32 (or wider) whatever the parameters are.
    params: the parameters after the optimizer's step.
    update: number i of this update, from 0, where the parameters are copied.
    exponent: gamma, from `ema_exponent`.
  """
  beta, rest = ema_beta(update, exponent)
  return jax.tree.map(
    lambda e, p: (
      beta.astype(e.dtype) * e + rest.astype(e.dtype) * p.astype(e.dtype)
    ),
    ema,
    params,
  )
