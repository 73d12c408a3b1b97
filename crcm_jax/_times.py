"""Broadcasting and validating times: `t`'s shape is a prefix of `x`'s.

Arrays are `[b, *frames, *features]`, times `[b, *frames]`: a video
`[b, f, h, w, c]` has one time a frame, `[b, f]`; a 2-D toy `[b, 2]` has one
time an example, `[b]`.
"""

from typing import Any, TypeAlias

import jax.core
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float

Times: TypeAlias = Array | np.ndarray
"""Times as an array, or known on the host."""


def wide_dtype(dtype: Any) -> Any:
  """Returns float32 for narrower floats, and any wider float itself."""
  return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def wide(x: Array) -> Array:
  """Casts to at least float32; float64 stays float64."""
  return x.astype(wide_dtype(x.dtype))


def expand(t: Float[Array, "*frames"], x: Array) -> Array:
  """Gives `t` the rank of `x` and the dtype of `wide(x)`."""
  t = t.astype(wide_dtype(x.dtype))
  return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def check_prefix(name: str, t: Array, x: Array) -> None:
  """Checks that the shape of `t` is a prefix of the shape of `x`.

  Raises:
    ValueError: if it is not, with the shape that would be.
  """
  if t.ndim >= 1 and t.shape == x.shape[: t.ndim]:
    return
  rank = min(max(t.ndim, 1), x.ndim)
  raise ValueError(
    f"`{name}` must have a shape that begins the shape {x.shape} of the"
    f" array it belongs to, such as {x.shape[:rank]}; got {t.shape}."
    " Repeat a per-example time over frames with"
    " `jnp.repeat(t[:, None], frames, 1)`."
  )


def check_same_shape(name: str, weight: Array | None, t: Array) -> None:
  """Checks that an optional weight has one value for each time.

  Raises:
    ValueError: if it has another shape than the times.
  """
  if weight is not None and weight.shape != t.shape:
    raise ValueError(
      f"`{name}` must hold one value for each time, {t.shape};"
      f" got {weight.shape}."
    )


def check_range(name: str, t: Times, top: float = 1.0) -> None:
  """Checks that concrete times lie in [0, top]; NaN passes.

  Under a transformation the values are unknown and nothing is checked.

  Raises:
    ValueError: if a time lies outside, naming the extremes.
  """
  values = _values(t)
  if values is None or values.size == 0:
    return
  low, high = float(values.min()), float(values.max())
  if low < 0 or high > top * (1 + 1e-6):
    unit = "rectified-flow times" if top == 1 else "TrigFlow angles"
    raise ValueError(
      f"`{name}` must hold {unit} in [0, {top:.5g}]; got values from"
      f" {low:.5g} to {high:.5g}. Network time steps (1000 t) and noise"
      " levels (sigma) are other units: t = sigma / (1 + sigma)."
    )


def check_decreasing(
  name: str, times: Times, frame_weight: Array | None = None
) -> None:
  """Checks that concrete times decrease along the last axis.

  Frames whose weight is 0 may stand still, as an image prefix does.

  Raises:
    ValueError: if there are fewer than two, or if one is not below the last.
  """
  if times.ndim < 1 or times.shape[-1] < 2:
    raise ValueError(
      f"`{name}` must hold at least two times, start and end, along its last"
      f" axis; got the shape {times.shape}."
    )
  values, weight = _values(times), _values(frame_weight)
  if values is None or (weight is None) != (frame_weight is None):
    return
  stalls = values[..., 1:] >= values[..., :-1]
  if weight is not None:
    stalls &= (weight > 0)[..., None]
  if stalls.any():
    raise ValueError(
      f"`{name}` must decrease along its last axis, from noise to data;"
      f" got {values.tolist()}. Reverse it if it increases."
    )


def check_order(name: str, early: Array, late: Array) -> None:
  """Checks that no concrete time of `early` exceeds its one of `late`.

  Raises:
    ValueError: if one does.
  """
  before, after = _values(early), _values(late)
  if before is None or after is None:
    return
  if (before > after).any():
    raise ValueError(
      f"`{name}` must not exceed the time it ends: got {before.tolist()} for"
      f" {after.tolist()}."
    )


def _values(x: Times | None) -> np.ndarray | None:
  """Returns the values of a concrete array, None of a traced or absent one."""
  if x is None or isinstance(x, jax.core.Tracer):
    return None
  local = getattr(x, "is_fully_addressable", True)
  return np.asarray(x) if local else None
