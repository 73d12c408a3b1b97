"""Puts a network's activations on the devices of a mesh."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from crcm_jax.training._rules import (
  AnyMesh,
  CACHE_BY_HEADS,
  CACHE_BY_TOKENS,
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
  """

  mesh: AnyMesh
  rules: Rules

  @classmethod
  def for_heads(cls, mesh: AnyMesh, heads: int) -> "Placement":
    """Returns the placement of a network with so many heads."""
    over = mesh.shape["tensor"] * mesh.shape["context"]
    by_heads = heads % over == 0
    return cls(mesh, CACHE_BY_HEADS if by_heads else CACHE_BY_TOKENS)

  def __call__(self, name: str, tree: Any) -> Any:
    """Returns the tree, its arrays where the rules put them."""
    return jax.tree.map_with_path(
      lambda path, x: jax.lax.with_sharding_constraint(
        x, self._sharding(path, x)
      ),
      {name: tree},
    )[name]

  def _sharding(self, path: Any, x: Any) -> NamedSharding:
    """Leaves out axes that do not divide, as of a few samples' batch."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = spec_of(name, self.rules)
    axes = [
      a if size % size_of(self.mesh, a) == 0 else None
      for a, size in zip(spec, x.shape, strict=False)
    ]
    return NamedSharding(self.mesh, PartitionSpec(*axes))


def size_of(mesh: AnyMesh, axes: Any) -> int:
  """Returns the devices along the axis or axes of one dimension."""
  names = (axes,) if isinstance(axes, str) else axes or ()
  return math.prod(mesh.shape[name] for name in names)
