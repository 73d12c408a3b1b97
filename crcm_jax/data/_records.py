"""What prepared datasets are made of: whole records, and named broken ones."""

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float


class LatentExample(NamedTuple):
  """A video as latents, and its caption as embeddings."""

  key: str
  """Names it, once in a dataset."""
  latents: Float[np.ndarray, "f h w c"]
  """Of about unit variance, as the network reads them."""
  embedding: Float[np.ndarray, "l d"]
  """Zero after the caption's last token."""
  caption: str


class BadRecord(NamedTuple):
  """A record that cannot be used."""

  key: str
  reason: str
  """Goes on after its name: "has no caption"."""


Records: TypeAlias = Iterator[LatentExample | BadRecord]
"""What a dataset is prepared from."""
