"""Classifier-free guidance, as a map between velocity functions.

    v = v_u + scale (v_c - v_u)

References:
  Ho and Salimans, Classifier-Free Diffusion Guidance,
  https://arxiv.org/abs/2207.12598
"""

from collections.abc import Callable

from crcm_jax._typing import Array


def classifier_free(
  conditional: Callable[..., Array],
  unconditional: Callable[..., Array],
  scale: float | Array,
) -> Callable[..., Array]:
  """Returns the guided velocity function `v_u + scale (v_c - v_u)`.

  Args:
    conditional: velocity function under the condition (text, action).
    unconditional: velocity function under the null condition.
    scale: 1 is no guidance, larger follows the condition more. The number 1
      never calls `unconditional`; 0 is unconditional.

  Returns:
    A velocity function of the same arguments.

  Example:
    >>> import jax.numpy as jnp
    >>> guided = classifier_free(lambda x: 2 * x, lambda x: x, scale=3.0)
    >>> guided(jnp.array(1.0))
    Array(4., dtype=float32, weak_type=True)
  """
  if isinstance(scale, int | float) and scale == 1:
    return conditional

  def guided(*args) -> Array:
    v_c, v_u = conditional(*args), unconditional(*args)
    return v_u + scale * (v_c - v_u)

  return guided
