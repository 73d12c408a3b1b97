"""What the training stages read: any iterator of `Batch` will do."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float


class Batch(NamedTuple):
  """Clean latents and what they are conditioned on; a pytree of arrays.

  An input pipeline may yield NumPy arrays: a jitted step takes them as they
  are. To resume where a run stopped, its iterator also has `get_state()` and
  `set_state(state)`, with a state that JSON can hold.
  """

  x_0: Float[Array, "b f h w c"]
  """Latents of about unit variance."""
  condition: Any
  """Pytree with leading axis b; for text, embeddings `[b, l, d]`, float32."""
  null_condition: Any
  """Of the same structure: what stands in where a condition is dropped."""
