"""What the train step needs of an objective."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from crcm_jax._typing import Array, Float, Params, PRNGKeyArray


class Masked(NamedTuple):
  """A metric that some examples have and others lack: averaged over the first.

  Attributes:
    value: of each example and part; zero where it is lacking.
    present: 1 where there is one, else 0.
  """

  value: Float[Array, "b parts"]
  present: Float[Array, "b parts"]


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
    (chunk), `[b, parts]`; integers are counts, and `Masked` is one that not
    every example has. The loss is deterministic.
    """
    ...
