"""Parameters as matrix products read them.

Every layer casts its float32 matrix, and its bias, to the dtype that it
computes in, in each pass anew. Where many short passes read the same
parameters, as in a rollout, this costs as much as computing: a working copy is
cast once.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Params

_LINEAR = r"(.*/)?blocks/.*(kernel|(?<!norm/)bias)"


def working_copy(params: Params, dtype: Any) -> Params:
  """Returns parameters whose layers' matrices and biases are in another dtype.

  These hold nearly all parameters. Norms, gates, times and the head stay as
  they are: they compute in float32. A network with this `WanConfig.dtype`
  computes the same. Gradients come back in the dtype of `params`; the sum over
  the uses of an array is made in `dtype`.

  Args:
    params: of a `Wan`.
    dtype: of its matrix products; float32, which stands for at least float32,
      changes nothing.
  """
  if jnp.dtype(dtype) == jnp.float32:
    return params
  cast = lambda path, p: (
    p.astype(dtype)
    if re.fullmatch(
      _LINEAR, jax.tree_util.keystr(path, simple=True, separator="/")
    )
    else p
  )
  return jax.tree.map_with_path(cast, params)
