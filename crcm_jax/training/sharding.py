"""Which device holds which part of an array, as data.

One mesh has the axes `data`, `fsdp`, `context` and `tensor`. Parameters go by
rules (`WAN_RULES`), activations by those of a `Placement`, and attention by
`ParallelAttention`; a batch's examples are split over `data` and `fsdp`.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from crcm_jax import models
from crcm_jax.training import _mesh_checks
from crcm_jax.training._mesh_checks import check_stage as check_stage
from crcm_jax.training._parallel_attention import (
  ParallelAttention as ParallelAttention,
)
from crcm_jax.training._placement import Placement as Placement
from crcm_jax.training._placement import size_of
from crcm_jax.training._rules import AXES as AXES
from crcm_jax.training._rules import BATCH, first_match, name_of, spec_of
from crcm_jax.training._rules import NAMED as NAMED
from crcm_jax.training._rules import read_rules as read_rules
from crcm_jax.training._rules import REPLICATED as REPLICATED
from crcm_jax.training._rules import Rules as Rules
from crcm_jax.training._rules import WAN_RULES as WAN_RULES


def make_mesh(
  *,
  data: int | None = None,
  fsdp: int = 1,
  context: int = 1,
  tensor: int = 1,
  devices: int | None = None,
) -> Mesh:
  """Returns a mesh of the four axes.

  Args:
    data: devices along which only the batch is split; None takes those that
      the other axes leave.
    fsdp: devices along which batch and parameters are split.
    context: devices along which tokens are split.
    tensor: devices along which heads and features are split.
    devices: how many of the devices to use, the first ones; None for all.

  Raises:
    ValueError: if the axes do not multiply to the devices to use.
  """
  found = jax.devices()
  used = len(found) if devices is None else devices
  if not isinstance(used, int) or not 0 < used <= len(found):
    raise ValueError(
      f"`mesh.devices` must be between 1 and {len(found)}, the devices that"
      f" there are; got {devices!r}."
    )
  found = found[:used]
  shape = _mesh_checks.fill(
    dict(data=data, fsdp=fsdp, context=context, tensor=tensor), len(found)
  )
  return jax.make_mesh(
    tuple(shape.values()),
    AXES,
    axis_types=(AxisType.Auto,) * len(AXES),
    devices=found,
  )


def shard_model(
  model: models.Wan, mesh: Mesh, *, lean: bool = False
) -> models.Wan:
  """Returns a network that computes on all devices of a mesh.

  Args:
    model: the network.
    mesh: the devices.
    lean: whether rollouts spare memory, not time: parameters are gathered
      layer by layer in each pass, and a cache is split over `context`.
      Otherwise both are whole on each device, but for `tensor`.
  """
  if mesh.size == 1:
    return model
  return model.clone(
    attention=ParallelAttention(mesh, model.attention, lean),
    place=Placement.for_heads(mesh, model.config.heads, lean=lean),
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
    ValueError: if no rule matches a leaf, or a rule has more axes than it, or
      its axes do not divide it.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = name_of(path)
    spec = spec_of(name, rules)
    # Counters are scalars, whatever their rule says.
    spec = spec if leaf.ndim else PartitionSpec()
    _check_fits(name, leaf.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree.map_with_path(one, tree)


def _check_fits(
  name: str, shape: Any, spec: Any, mesh: Mesh | AbstractMesh
) -> None:
  if len(spec) > len(shape):
    raise ValueError(
      f"`rules` must give {name} at most {len(shape)} axes; got {tuple(spec)}."
    )
  for size, axes in zip(shape, spec, strict=False):
    if size % size_of(mesh, axes):
      raise ValueError(
        f"`rules` must split {name}, {shape}, by {tuple(spec)}; {size} does not"
        f" divide by the {size_of(mesh, axes)} devices of {axes!r}. Change the"
        " mesh, or give `config.sharding` a rule that leaves it whole."
      )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Returns the sharding of a batch: examples over `data` and `fsdp`."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


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
  """Puts arrays that every process has whole where they shall live.

  Each device is sent its part alone: none need hold a whole array.
  """

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


def with_shardings(tree: Any, where: Any) -> Any:
  """Returns shapes and dtypes of arrays, with where each one shall live.

  Args:
    tree: pytree of arrays or their shapes.
    where: the sharding of each leaf, as of `shard`.
  """
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where
  )


def device_bytes(tree: Any) -> float:
  """Returns the bytes of one device's parts of arrays, or of their shapes."""
  return float(
    sum(
      math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
      for a in jax.tree.leaves(tree)
    )
  )


def describe(tree: Any, rules: Rules, place: Any = None) -> str:
  """Returns the mesh, and line by line what each rule splits, and how.

  Args:
    tree: pytree of arrays that lie by the rules, or their shapes.
    rules: those of `shard`; one that decides nothing has no line.
    place: the `Placement` of a network, to say how its caches lie.
  """
  mesh = jax.tree.leaves(tree)[0].sharding.mesh
  axes = "mesh " + " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items())
  if mesh.size == 1:
    return f"{axes}: everything on one device"
  found: dict[tuple[PartitionSpec, str], list[Any]] = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    pattern, _ = first_match(name_of(path), rules)
    found.setdefault((leaf.sharding.spec, pattern), []).append(leaf)
  lines = [
    f"{_axes(spec)}: {len(leaves)} arrays,"
    f" {device_bytes(leaves) / 2**30:.2f} GiB a device, by {pattern!r}"
    for (spec, pattern), leaves in found.items()
  ]
  if place is not None:
    spec = spec_of("cache/past/keys", place.rules)
    lines.append(f"{_axes(spec)}: a rollout's cache, [layers b f p n d]")
  return "\n  ".join([axes, *lines])


def _axes(spec: PartitionSpec) -> str:
  return str(tuple(spec)) if any(spec) else "whole"
