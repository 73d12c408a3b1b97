"""The gradient of a batch in parts, in the memory of one part.

k micro-batches are one batch of k times their size: loss and gradient are
means over all examples, metrics are those of each example, and every random
number is drawn for the whole batch before it is split. Only the order of
floating-point sums differs. One step stays one step: counters, learning rates
and averages know nothing of it.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from crcm_jax._times import wide_dtype
from crcm_jax._typing import Array, Float, Params

Losses: TypeAlias = Callable[[Params, Any, Any], tuple[Float[Array, "b"], Any]]
"""`losses(params, batch, draws)`: each example's loss, and metrics."""


def gradient(
  losses: Losses,
  params: Params,
  batch: Any,
  draws: Any,
  *,
  draw: Callable[[Any], Any],
  micro_batches: int = 1,
) -> tuple[tuple[Array, Any], Params]:
  """Returns ((mean loss, metrics), its gradient, at least float32 if summed).

  Args:
    losses: the loss of each example, of any number of them.
    params: what to differentiate by.
    batch: arrays of all examples, on the first axis; others are shared.
    draws: random numbers of all examples, on any one axis; others are shared.
    draw: `draw(batch)`, what made `draws`; asked for shapes alone.
    micro_batches: number of equal parts, one after another.

  Raises:
    ValueError: if the examples do not divide by it, or if a draw's shape
      depends on their number in more than one axis.
  """

  def one_part(batch: Any, draws: Any) -> tuple[tuple[Array, Any], Params]:
    def mean_loss(params: Params) -> tuple[Array, Any]:
      each, metrics = losses(params, batch, draws)
      return jnp.mean(each), metrics

    return jax.value_and_grad(mean_loss, has_aux=True)(params)

  if micro_batches == 1:
    return one_part(batch, draws)
  axes = _batch_axes(batch, draws, draw, micro_batches)
  parts, join = _split((batch, draws), axes, micro_batches)

  def add(total: Params, part: Any) -> tuple[Params, tuple[Array, Any]]:
    aux, grads = one_part(*join(part))
    return jax.tree.map(lambda t, g: t + g.astype(t.dtype), total, grads), aux

  zero = lambda p: jnp.zeros(p.shape, wide_dtype(p.dtype))
  total, (loss, metrics) = jax.lax.scan(add, jax.tree.map(zero, params), parts)
  grads = jax.tree.map(lambda t: t / micro_batches, total)
  return (jnp.mean(loss), jax.tree.map(_of_all, metrics)), grads


def _batch_axes(
  batch: Any, draws: Any, draw: Callable[[Any], Any], micro_batches: int
) -> tuple[list[int | None], list[int | None]]:
  """Returns the axis of each leaf that counts examples; None for no such."""
  examples = jax.tree.leaves(batch)[0].shape[0]
  if examples % micro_batches:
    raise ValueError(
      "`micro_batches` must divide the examples of a batch,"
      f" `config.data.batch_size` = {examples}; got {micro_batches}."
    )
  counts = lambda a: a.ndim and a.shape[0] == examples
  of_batch = [0 if counts(a) else None for a in jax.tree.leaves(batch)]
  fewer = jax.tree.map(
    lambda a: (
      jax.ShapeDtypeStruct((a.shape[0] // micro_batches, *a.shape[1:]), a.dtype)
      if counts(a)
      else a
    ),
    batch,
  )
  small = jax.tree.leaves(jax.eval_shape(draw, fewer))
  of_draws = [
    _differing_axis(a.shape, b.shape)
    for a, b in zip(jax.tree.leaves(draws), small, strict=True)
  ]
  return of_batch, of_draws


def _differing_axis(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
  axes = [i for i, (n, m) in enumerate(zip(one, other, strict=True)) if n != m]
  if len(axes) > 1:
    raise ValueError(
      "a draw's shape must depend on the number of examples in one axis, to be"
      f" split into micro-batches; got {one} and {other}."
    )
  return axes[0] if axes else None


def _split(
  trees: Any, axes: tuple[list[int | None], ...], parts: int
) -> tuple[list[Array], Callable[[list[Array]], Any]]:
  """Splits the leaves that have an axis of examples.

  A part takes every `parts`-th example, so that each device, which holds
  neighbours, has as many in every part.

  Returns:
    The leaves, `[parts, ...]`, and what makes the trees of one part of them.
  """
  leaves, tree = jax.tree.flatten(trees)
  flat = [axis for part in axes for axis in part]

  def split(a: Array, axis: int) -> Array:
    size = a.shape[axis] // parts
    shape = (*a.shape[:axis], size, parts, *a.shape[axis + 1 :])
    return jnp.moveaxis(jnp.reshape(a, shape), axis + 1, 0)

  pairs = list(zip(leaves, flat, strict=True))
  xs = [split(a, axis) for a, axis in pairs if axis is not None]

  def join(part: list[Array]) -> Any:
    given = iter(part)
    return tree.unflatten(
      a if axis is None else next(given) for a, axis in pairs
    )

  return xs, join


def _of_all(parts: Array) -> Array:
  """Joins a metric's values of all parts: of examples, or of the batch."""
  if parts.ndim > 1:
    return parts.reshape(-1, *parts.shape[2:])
  over = jnp.sum if jnp.issubdtype(parts.dtype, jnp.integer) else jnp.mean
  return over(parts, axis=0)
