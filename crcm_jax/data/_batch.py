"""What the training stages read: any `BatchIterator` will do."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float


class Batch(NamedTuple):
  """Clean latents and what they are conditioned on; a pytree of arrays.

  An input pipeline may yield NumPy arrays: a jitted step takes them as they
  are.
  """

  x_0: Float[Array, "b f h w c"]
  """Latents of about unit variance."""
  condition: Any
  """Pytree with leading axis b; for text, embeddings `[b, l, d]`, float32."""
  null_condition: Any
  """Of the same structure: what stands in where a condition is dropped."""


@runtime_checkable
class BatchIterator(Protocol):
  """An iterator of batches that a run can resume where it stopped.

  Grain's dataset iterators are of this kind.
  """

  def __iter__(self) -> Iterator[Batch]:
    """Returns itself."""
    ...

  def __next__(self) -> Batch:
    """Returns the next batch."""
    ...

  def get_state(self) -> dict[str, Any]:
    """Returns the position, in a form that JSON can hold."""
    ...

  def set_state(self, state: dict[str, Any], /) -> None:
    """Moves to a position that `get_state` returned."""
    ...
