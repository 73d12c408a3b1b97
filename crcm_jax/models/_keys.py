"""How a network's parameters are called in torch, as a table.

Each torch key has one entry: where its value goes and the maps of it. Layers
that torch numbers and we stack share a path; `layer` is their place in it.
Every map is linear, so gradients convert as parameters do.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

Map: TypeAlias = Callable[[np.ndarray], np.ndarray]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class Entry(NamedTuple):
  """One torch key: where it goes, its shape, and the two maps of its value."""

  path: str
  layer: int | None
  shape: tuple[int, ...]
  to_ours: Map
  to_torch: Map

  def accepts(self, shape: tuple[int, ...]) -> bool:
    """Whether an array is this one: as it is, flattened, or squeezed.

    A convolution whose patches do not overlap is a linear layer of flattened
    patches, and is stored as either.
    """
    squeeze = lambda shape: [n for n in shape if n != 1]
    flat = (self.shape[0], math.prod(self.shape[1:]))
    return shape == flat or squeeze(shape) == squeeze(self.shape)


class Keys:
  """Collects the entries of a network.

  Attributes:
    entries: what was collected, by torch key.
  """

  def __init__(self):
    self.entries: dict[str, Entry] = {}

  def array(
    self,
    key: str,
    path: str,
    shape: tuple[int, ...],
    layer: int | None = None,
    *,
    ours: tuple[int, ...] | None = None,
  ) -> None:
    """Adds an array that is as it is, or of another shape here, `ours`."""
    here = shape if ours is None else ours
    self.entries[key] = Entry(
      path, layer, shape, lambda a: a.reshape(here), lambda a: a.reshape(shape)
    )

  def linear(
    self,
    key: str,
    path: str,
    inputs: int,
    outputs: int,
    layer: int | None = None,
    *,
    bias: bool = True,
  ) -> None:
    """Adds a Linear: [out, in] there, [in, out] here."""
    shape = (outputs, inputs)
    self.entries[f"{key}.weight"] = Entry(
      f"{path}/kernel",
      layer,
      shape,
      lambda a: a.reshape(shape).T,
      lambda a: a.T,
    )
    if bias:
      self.array(f"{key}.bias", f"{path}/bias", (outputs,), layer)

  def conv(
    self,
    key: str,
    path: str,
    kernel: tuple[int, ...],
    inputs: int,
    outputs: int,
  ) -> None:
    """Adds a convolution: [out, in, *kernel] there, here [t, y, x, in, out]."""
    shape = (outputs, inputs, *kernel)
    ours = (1,) * (3 - len(kernel)) + kernel

    def to_ours(a: np.ndarray) -> np.ndarray:
      return a.reshape(outputs, inputs, *ours).transpose(2, 3, 4, 1, 0)

    def to_torch(a: np.ndarray) -> np.ndarray:
      return a.transpose(4, 3, 0, 1, 2).reshape(shape)

    self.entries[f"{key}.weight"] = Entry(
      f"{path}/kernel", None, shape, to_ours, to_torch
    )
    self.array(f"{key}.bias", f"{path}/bias", (outputs,))


@dataclasses.dataclass(frozen=True)
class Network:
  """A kind of network that can be converted.

  Attributes:
    name: what it is called in messages.
    config: the class of its config.
    anchors: by layout, a key that only this network has in this layout.
    table: its entries, of a config and a layout.
    infer: its config, of the shapes by key and a layout.
    aliases: keys that repeat another one's array, and that other.
    unused: a pattern of keys that some files hold and no network reads.
  """

  name: str
  config: type
  anchors: Mapping[str, str]
  table: Callable[[Any, str], dict[str, Entry]]
  infer: Callable[[Shapes, str], Any]
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  unused: str = ""


def count(shapes: Shapes, pattern: str) -> int:
  """Counts the layers 0, 1, ... whose key `pattern.format(i)` is there."""
  layers = 0
  while pattern.format(layers) in shapes:
    layers += 1
  return layers
