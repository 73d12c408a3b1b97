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
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def shard(tree: Any, mesh: Mesh, rules: Rules = REPLICATED) -> Any:
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


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: examples over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def local_rows(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
  """Returns which examples of a batch the devices of this process hold.

  Processes that only hold other tokens or features of the same examples all
  read them.

  Args:
    mesh: where the batch shall live.
    batch_size: examples in a batch of all processes together.

  Raises:
    ValueError: if a process has no device in the mesh.
  """
  used = {device.process_index for device in mesh.devices.flat}
  if idle := sorted(set(range(jax.process_count())) - used):
    raise ValueError(
      "`mesh` must have devices of every process; it has"
      f" {dict(mesh.shape)}, {mesh.size} of {jax.device_count()} devices, and"
      f" none of processes {idle}. Set"
      f" `--config.mesh.data={jax.device_count()}`, or start fewer processes."
    )
  slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = np.arange(batch_size)
  held = [rows[index] for index in slices.values()]
  return tuple(sorted(set(np.concatenate(held).tolist())))


def place(tree: Any, shardings: Any) -> Any:
  """Puts arrays that every process has whole where they shall live."""
  if jax.process_count() == 1:
    return jax.device_put(tree, shardings)

  def one(leaf: Any, where: NamedSharding) -> jax.Array:
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, where, whole.__getitem__)

  return jax.tree.map(one, tree, shardings)


def fetch(array: Any) -> np.ndarray:
  """Returns a whole array, whichever processes hold its parts.

  All processes must call this together.
  """
  if jax.process_count() == 1:
    return np.asarray(array)
  return multihost_utils.process_allgather(array, tiled=True)


def place_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's rows of a batch on its devices."""
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
