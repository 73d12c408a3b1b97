"""What the train step needs of an objective."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from crcm_jax._typing import Array, Float, Params, PRNGKeyArray


@runtime_checkable
class Objective(Protocol):
  """One stage's loss, with its randomness apart from its mathematics.

  `frozen` holds what is not trained, by name: "teacher" (causal),
  "real" (bidirectional teacher), and whichever of "student" and "fake" the
  current phase does not train.
  """

  def draws(self, key: PRNGKeyArray, batch: Any, counters: Any) -> NamedTuple:
    """Returns every random number of one evaluation of the loss."""
    ...

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: Any,
    counters: Any,
  ) -> tuple[Float[Array, "b"], NamedTuple]:
    """Returns each example's loss, and metrics. Deterministic."""
    ...
