"""Which device holds which part of an array, as data.

One mesh has the axes `data`, `fsdp`, `context` and `tensor`. A rule is a
regular expression for the path of a parameter and the mesh axes of its
dimensions; the first rule that matches decides. Optimizer moments and moving
averages have the parameters' paths in theirs, and so the same rules.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

AXES = ("data", "fsdp", "context", "tensor")

Rules: TypeAlias = Sequence[tuple[str, Sequence[str | None]]]
"""Pairs of a regular expression and the mesh axis of each dimension."""

REPLICATED: Rules = ((".*", ()),)
"""Every device holds everything."""


def make_mesh(
  *, data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1
) -> Mesh:
  """Returns a mesh of the first devices with the four axes.

  Args:
    data: devices along which only the batch is split.
    fsdp: devices along which batch and parameters are split.
    context: devices along which tokens are split.
    tensor: devices along which heads and features are split.

  Raises:
    ValueError: if there are too few devices.
  """
  shape = (data, fsdp, context, tensor)
  needed, devices = math.prod(shape), jax.devices()
  if needed > len(devices):
    raise ValueError(
      f"`mesh` must have at most {len(devices)} devices, as many as there are;"
      f" got {dict(zip(AXES, shape, strict=True))}."
    )
  return jax.make_mesh(
    shape,
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=devices[:needed],
  )


def shard(
  tree: Any, mesh: Mesh | AbstractMesh, rules: Rules = REPLICATED
) -> Any:
  """Returns the sharding of each leaf.

  Args:
    tree: pytree of arrays or their shapes.
    mesh: where they shall live.
    rules: first match wins. A rule with fewer axes than a leaf has
      dimensions leaves the last ones whole.

  Raises:
    ValueError: if no rule matches a leaf, or a rule has more axes than it.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = _axes_of(name, rules)
    # Counters are scalars, whatever their rule says.
    axes = axes if leaf.ndim else ()
    if len(axes) > leaf.ndim:
      raise ValueError(
        f"`rules` must give {name} at most {leaf.ndim} axes; got {axes}."
      )
    return NamedSharding(mesh, PartitionSpec(*axes))

  return jax.tree.map_with_path(one, tree)


def _axes_of(name: str, rules: Rules) -> tuple[str | None, ...]:
  for pattern, axes in rules:
    if re.fullmatch(pattern, name):
      return tuple(axes)
  raise ValueError(
    f"`rules` must match every leaf; none matches {name!r}. End them with"
    " ('.*', ())."
  )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding of a batch: examples over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's examples on its devices."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def describe(shardings: Any) -> str:
  """Returns a line for each way of sharding: how many arrays have it."""
  counts: dict[str, int] = {}
  for leaf in jax.tree.leaves(shardings):
    spec = str(tuple(leaf.spec)) if any(leaf.spec) else "replicated"
    counts[spec] = counts.get(spec, 0) + 1
  return ", ".join(f"{n} arrays {spec}" for spec, n in counts.items())
