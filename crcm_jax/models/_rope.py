r"""Rotary position embedding over time, rows and columns (SPEC section 2).

A head of width d gives $d_h = d_w = 2 \lfloor d / 6 \rfloor$ of its features to
rows and to columns and $d_t = d - 2 d_h$ to time. Pair k of an axis of width
$d_a$ turns by $\mathrm{position} \cdot 10000^{-2k / d_a}$:

$$(x_{2m}, x_{2m+1}) \mapsto
(x_{2m} \cos - x_{2m+1} \sin,\; x_{2m} \sin + x_{2m+1} \cos).$$
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float, Int
from crcm_jax.models._phases import phases

BASE = 10000.0


class RopeTable(NamedTuple):
  """Cosines and signed sines of every token, each repeated over its pair."""

  cos: Float[Array, "1 f p 1 d"]
  sin: Float[Array, "1 f p 1 d"]
  """Sines, negated at even features."""


def axis_widths(head_width: int) -> tuple[int, int, int]:
  """Returns the features of a head given to time, rows and columns."""
  space = 2 * (head_width // 6)
  return head_width - 2 * space, space, space


def rope_angles(
  frames: int,
  rows: int,
  columns: int,
  head_width: int,
  *,
  first_frame: int | Int[Array, ""] = 0,
  dtype: Any = jnp.float32,
) -> Float[Array, "s pairs"]:
  """Computes the angle of every feature pair of every token, up to 2 pi.

  Args:
    frames: latent frames; tokens run over frames, then rows, then columns.
    rows: token rows of a frame.
    columns: token columns of a frame.
    head_width: width d of a head.
    first_frame: absolute index of the first frame, known at run time only.
    dtype: dtype of the angles, at least float32.

  Returns:
    Angles in radians, time pairs first, then rows, then columns. Whole turns
    are left out, which keeps the digits of far positions.
  """
  shape = (frames, rows, columns)
  positions = [
    (first_frame + jnp.arange(frames, dtype=jnp.int32)).astype(dtype),
    jnp.arange(rows, dtype=dtype),
    jnp.arange(columns, dtype=dtype),
  ]
  angles = []
  for axis, width in enumerate(axis_widths(head_width)):
    rates = BASE ** (-np.arange(0, width, 2) / max(width, 1))
    angle = phases(positions[axis], rates)
    along = [1, 1, 1, width // 2]
    along[axis] = shape[axis]
    angles.append(jnp.broadcast_to(angle.reshape(along), (*shape, width // 2)))
  return jnp.concatenate(angles, axis=-1).reshape(-1, head_width // 2)


def rope_table(*args: int, **kwargs: Any) -> RopeTable:
  """Tabulates what `rotate` needs; arguments as for `rope_angles`."""
  frames, rows, columns, head_width = args
  angles = rope_angles(*args, **kwargs)
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  interleave = lambda even, odd: jnp.stack([even, odd], -1).reshape(
    1, frames, rows * columns, 1, head_width
  )
  return RopeTable(interleave(cos, cos), interleave(-sin, sin))


def rotate(
  x: Float[Array, "b f p n d"], table: RopeTable
) -> Float[Array, "b f p n d"]:
  """Turns the feature pairs of queries or keys, in the dtype of the table."""
  x = x.astype(table.cos.dtype)
  swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
  return x * table.cos + swapped * table.sin
