"""Puts a network's activations on the devices of a mesh."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from crcm_jax.training._rules import (
  activation_rules,
  AnyMesh,
  CACHE_BY_HEADS,
  CACHE_BY_TOKENS,
  CACHE_WHOLE,
  name_of,
  Rules,
  spec_of,
)


@dataclasses.dataclass(frozen=True)
class Placement:
  """Constrains arrays inside `jax.jit`; the `place` of a `models.Wan`.

  Without it XLA might gather tokens, or keep a cache on every device.

  Attributes:
    mesh: the devices.
    rules: for the paths `tokens` and `cache/past/keys`, ....
    lean: whether rollouts spare memory, not time: parameters are gathered
      layer by layer in each pass, and a cache is split over `context`.
  """

  mesh: AnyMesh
  rules: Rules
  lean: bool = False

  @classmethod
  def for_heads(
    cls, mesh: AnyMesh, heads: int, *, lean: bool = False
  ) -> "Placement":
    """Returns the placement of a network with so many heads."""
    divide = heads % size_of(mesh, ("tensor", "context")) == 0
    split = CACHE_BY_HEADS if divide else CACHE_BY_TOKENS
    return cls(mesh, activation_rules(split if lean else CACHE_WHOLE), lean)

  def __call__(self, name: str, tree: Any) -> Any:
    """Returns the tree, its arrays where the rules put them."""
    if name == "network" and self.lean:
      return tree
    return jax.tree.map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(
        x, NamedSharding(self.mesh, self.spec(name_of(path), x))
      ),
      {name: tree},
    )[name]

  def spec(self, name: str, x: Any) -> PartitionSpec:
    """Leaves out axes that do not divide, as of a few samples' batch."""
    spec = spec_of(name, self.rules)
    axes = [
      a if size % size_of(self.mesh, a) == 0 else None
      for a, size in zip(spec, x.shape, strict=False)
    ]
    return PartitionSpec(*axes)


def size_of(mesh: AnyMesh, axes: Any) -> int:
  """Returns the devices along the axis or axes of one dimension."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)
