"""What the train step needs of an objective."""

from typing import Any, Protocol, runtime_checkable

from crcm_jax._typing import Array, Float, Params, PRNGKeyArray


@runtime_checkable
class Objective(Protocol):
  """One stage's loss, with its randomness apart from its mathematics.

  `frozen` holds what is not trained, by name: "teacher" (causal),
  "real" (bidirectional teacher), and whichever of "student" and "fake" the
  current phase does not train.
  """

  def draws(self, key: PRNGKeyArray, batch: Any, counters: Any) -> Any:
    """Returns every random number of the loss, as a NamedTuple."""
    ...

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: Any,
    counters: Any,
  ) -> tuple[Float[Array, "b"], Any]:
    """Returns each example's loss, and metrics: a NamedTuple of arrays.

    A field is a number, or has one per example, or per example and part
    (chunk), `[b, parts]`; integers are counts. The loss is deterministic.
    """
    ...
