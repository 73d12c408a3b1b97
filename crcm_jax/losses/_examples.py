"""What all losses share: masks, weighted sums, and the non-finite policy.

A non-finite number from data, a teacher, a fake score or a tangent costs its
own example only, in value and in gradient:

- `clean_inputs` zeroes a bad example *before* the network sees it (0 * NaN is
  NaN in a backward pass),
- `keep` says which examples count, and `zero` masks *before* squaring.

A non-finite number born in the student's own forward is never masked: `keep`
keeps its example, so loss and gradient show it and the training step can
refuse the whole update.
"""

from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax import _times
from crcm_jax._times import expand
from crcm_jax._typing import Array, Bool, Float


def finite_examples(tree: Any) -> Bool[Array, "b"]:
  """Returns which examples of a batch are finite in every float leaf.

  Args:
    tree: a pytree of arrays with the batch axis first.

  Returns:
    True for each example without NaN or infinity.
  """
  leaves = [
    x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)
  ]
  flags = [jnp.isfinite(x.reshape(x.shape[0], -1)).all(axis=1) for x in leaves]
  return jnp.stack(flags).all(axis=0)


def zero_examples(tree: Any, keep: Bool[Array, "b"]) -> Any:
  """Sets every leaf to zero in the examples that are not kept.

  Losses do this to their own arguments. Do it to what a velocity function
  closes over (text, clean context), and give the example a `frame_weight` of
  zero, so that bad data there costs one example too.

  Args:
    tree: a pytree of arrays with the batch axis first.
    keep: which examples to leave as they are.

  Returns:
    The pytree with zeros in the other examples.
  """

  def select(x: Array) -> Array:
    shape = keep.shape + (1,) * (x.ndim - 1)
    return jnp.where(keep.reshape(shape), x, jnp.zeros((), x.dtype))

  return jax.tree.map(select, tree)


def clean_inputs(
  x_0: Array, noise: Array, t: Array
) -> tuple[Array, Array, Array, Bool[Array, "b"]]:
  """Zeroes the examples with a non-finite input, and says which are clean."""
  clean = finite_examples((x_0, noise, t))
  return *zero_examples((x_0, noise, t), clean), clean


def keep_examples(
  student: Array, clean: Bool[Array, "b"], *others: Array
) -> Bool[Array, "b"]:
  """Returns which examples count.

  Args:
    student: what the student's forward gave; where it is not finite, the
      example is kept, for the training step to see.
    clean: which examples had finite inputs.
    *others: what data, teachers and tangents gave.
  """
  usable = clean
  for other in others:
    usable &= finite_examples(other)
  return usable | ~finite_examples(student)


def check_arguments(
  x_0: Array, t: Array, frame_weight: Array | None, name: str = "t"
) -> None:
  """Checks the times and the frame weight of a loss.

  Raises:
    ValueError: if a shape does not fit or a time is out of range.
  """
  _times.check_prefix(name, t, x_0)
  _times.check_same_shape("frame_weight", frame_weight, t)
  _times.check_range(name, t)


def check_velocity(v: Array, x: Array, name: str = "velocity") -> Array:
  """Returns a network's output in at least float32, after checking its shape.

  Raises:
    ValueError: if the network returned another shape than its input's.
  """
  if v.shape != x.shape:
    raise ValueError(
      f"`{name}` must return an array of its input's shape {x.shape};"
      f" got {v.shape}."
    )
  return _times.wide(v)


def moving(t: Array, frame_weight: Array | None) -> Array:
  """Returns 1 for each frame that takes part, 0 for a removed one."""
  if frame_weight is None:
    return jnp.ones_like(t)
  return (frame_weight > 0).astype(t.dtype)


def weighted_sum(
  x: Float[Array, "b *shape"], frame_weight: Array | None
) -> Float[Array, "b"]:
  """Sums everything but the batch, weighting each frame."""
  if frame_weight is not None:
    w = expand(frame_weight, x)
    x = jnp.where(w > 0, w * x, jnp.zeros((), x.dtype))
  return x.sum(axis=tuple(range(1, x.ndim)))


def weighted_mean(
  x: Float[Array, "b *shape"], frame_weight: Array | None
) -> Float[Array, "b"]:
  """Averages everything but the batch, weighting each frame.

  An example without any weight has the mean 0.
  """
  count = weighted_sum(jnp.ones_like(x), frame_weight)
  return weighted_sum(x, frame_weight) / jnp.maximum(count, 1e-9)


def mean_over_features(
  x: Float[Array, "b *shape"], t: Float[Array, "b *frames"]
) -> Float[Array, "b *frames"]:
  """Averages the axes that `t` does not have, those of one frame."""
  return x.mean(axis=tuple(range(t.ndim, x.ndim)))


def norm(x: Array, frame_weight: Array | None) -> Float[Array, "b"]:
  """Returns each example's Euclidean norm, weighting squared frames.

  Squares are taken of `x` over its largest element, so that a large tangent
  does not overflow; a removed frame has no say in which that is.
  """
  axes = tuple(range(1, x.ndim))
  if frame_weight is not None:
    kept = expand(frame_weight, x) > 0
    x = jnp.where(kept, x, jnp.zeros((), x.dtype))
  largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axes)
  size = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
  square = jnp.square(x / expand(size, x))
  return size * jnp.sqrt(weighted_sum(square, frame_weight))
