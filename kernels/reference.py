"""Attention as its equation: the ground truth that kernels are tested against.

    o_i = sum_j p_ij v_j,   p_ij = softmax_j(scale q_i . k_j) over visible j

Everything is dense, so time and memory grow with queries times keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from crcm_jax.kernels.backend import Operands, Problem, sum_dtype


def attention(
  q: Float[Array, "b s n d"],
  k: Float[Array, "b z n d"],
  v: Float[Array, "b z n d"],
  visible: Bool[Array, "s z"],
  *,
  scale: float,
) -> Float[Array, "b s n d"]:
  """Computes masked attention in at least float32.

  Args:
    q: Queries.
    k: All keys, context first.
    v: Their values.
    visible: Which query sees which key.
    scale: Factor on the scores.

  Returns:
    The output; 0 for a query that sees nothing.
  """
  dtype = sum_dtype(q.dtype)
  # What no query sees may hold anything, even NaN: 0 * NaN must not appear.
  seen = visible.any(0)[None, :, None, None]
  k, v = (jnp.where(seen, x, 0).astype(dtype) for x in (k, v))
  s = scale * jnp.einsum("bsnd,bznd->bnsz", q.astype(dtype), k)
  p = _masked_softmax(s, visible[None, None])
  return jnp.einsum("bnsz,bznd->bsnd", p, v).astype(q.dtype)


def _masked_softmax(s, visible):
  s = jnp.where(visible, s, -1e30)
  m = jax.lax.stop_gradient(s.max(-1, keepdims=True))
  p = jnp.where(visible, jnp.exp(s - m), 0)
  total = p.sum(-1, keepdims=True)
  return p / jnp.where(total == 0, 1, total)


def from_operands(problem: Problem, x: Operands) -> Array:
  """Computes the attention that `problem` describes.

  Args:
    problem: Its mask and scale are used.
    x: The arrays.

  Returns:
    The output, `[b s n d]`.
  """
  parts = [_visible(problem.mask)]
  if x.ranges is not None:
    token = jnp.arange(x.keys[0].shape[1], dtype=jnp.int32)[:, None]
    seen = (token >= x.ranges[None, :, 0]) & (token < x.ranges[None, :, 1])
    parts.insert(0, jnp.broadcast_to(seen.any(1), (x.q.shape[1], len(token))))
  k, v = (jnp.concatenate(a, 1) for a in (x.keys, x.values))
  visible = jnp.concatenate(parts, 1)
  return attention(x.q, k, v, visible, scale=problem.scale)


def _visible(mask):
  visible = jnp.zeros((mask.num_queries, mask.num_keys), bool)
  for (start, stop), keys in mask.rows:
    for first, last in keys:
      visible = visible.at[start:stop, first:last].set(True)
  return visible
