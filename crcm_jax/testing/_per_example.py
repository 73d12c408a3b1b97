"""A check that a loss treats each example apart from the rest of its batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndependenceReport:
  """How much each example's loss changes with the rest of its batch.

  Attributes:
    loss_errors: relative change of each example's loss.
    gradient_errors: relative change of its gradient.
    tolerance: the largest change allowed.
  """

  loss_errors: tuple[float, ...]
  gradient_errors: tuple[float, ...]
  tolerance: float

  @property
  def passed(self) -> bool:
    """Whether no example depends on another."""
    errors = (*self.loss_errors, *self.gradient_errors)
    return all(error <= self.tolerance for error in errors)

  def __str__(self) -> str:
    verdict = "ignores" if self.passed else "DEPENDS ON"
    rows = [
      f"  {i:<8d} {loss:.1e}  {gradient:.1e}"
      for i, (loss, gradient) in enumerate(
        zip(self.loss_errors, self.gradient_errors, strict=True)
      )
    ]
    return "\n".join(
      [
        f"an example's loss {verdict} the rest of its batch (relative"
        f" tolerance {self.tolerance:.0e})",
        "  example  loss     gradient",
        *rows,
      ]
    )


def check_loss_is_per_example(
  loss: Callable[..., Any],
  params: Params,
  *batch: Any,
  tolerance: float = 1e-5,
) -> IndependenceReport:
  """Checks that an example's loss and gradient ignore the rest of its batch.

  Each example is evaluated in its batch and in a batch of its own copies. A
  normaliser over the whole batch, a mean in place of a value for each example,
  or a network with batch statistics shows as a difference.

  Args:
    loss: `loss(params, *batch)`, which returns the loss of each example, alone
      or before others: every loss of `crcm_jax.losses` with its networks
      closed over.
    params: parameters to differentiate.
    *batch: arrays, or pytrees of arrays, with the batch axis first: data,
      noise, times.
    tolerance: the largest relative change allowed; rounding reaches about
      1e-6 in float32.

  Returns:
    The report.

  Raises:
    AssertionError: if an example depends on another one, with the report.
    ValueError: if there are fewer than two examples, or the loss does not
      return one value for each.
  """
  examples = jax.tree.leaves(batch)[0].shape[0]
  if examples < 2:
    raise ValueError(
      f"`batch` must hold at least two examples; got {examples}."
    )

  @jax.jit
  def of_example(index: Array, batch: Any) -> tuple[Array, Params]:
    pick = lambda p: _values(loss(p, *batch), examples)[index]
    return jax.value_and_grad(pick)(params)

  loss_errors, gradient_errors = [], []
  for i in range(examples):
    alone = jax.tree.map(lambda a, i=i: jnp.stack([a[i]] * examples), batch)
    (value, grads), (expected, expected_grads) = (
      of_example(jnp.asarray(i), b) for b in (batch, alone)
    )
    loss_errors.append(_error(value, expected))
    gradient_errors.append(_error(grads, expected_grads))
  report = IndependenceReport(
    loss_errors=tuple(loss_errors),
    gradient_errors=tuple(gradient_errors),
    tolerance=tolerance,
  )
  if not report.passed:
    raise AssertionError(str(report))
  return report


def _values(result: Any, examples: int) -> Array:
  """Returns the losses of a result, after checking that they are one each."""
  values = result[0] if isinstance(result, tuple) else result
  if values.shape != (examples,):
    raise ValueError(
      f"`loss` must return one value for each example, ({examples},); got"
      f" {values.shape}. Return the losses before they are averaged."
    )
  return values


def _error(tree: Any, expected: Any) -> float:
  """Returns the relative L2 difference; what is below 1e-6 counts as 1e-6."""
  difference = jax.tree.map(jnp.subtract, tree, expected)
  return float(_norm(difference) / jnp.maximum(_norm(expected), 1e-6))


def _norm(tree: Any) -> Array:
  squares = [
    jnp.square(a.astype(jnp.float32)).sum() for a in jax.tree.leaves(tree)
  ]
  return jnp.sqrt(sum(squares[1:], squares[0]))
