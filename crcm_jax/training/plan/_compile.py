"""A stage's train step, compiled for devices that are not there.

TPU programs are compiled by libtpu, the real compiler, without a TPU. In place
of GPUs as many fake CPU devices are used: memory and collectives are then an
estimate, since XLA splits the program alike but fuses it differently.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from crcm_jax import kernels, models
from crcm_jax._typing import Array
from crcm_jax.training import sharding
from crcm_jax.training._stages import Phase, Stage
from crcm_jax.training._step import Shardings
from crcm_jax.training.plan._chips import GIB, Topology


class Compiled(NamedTuple):
  """What a compiler said.

  Attributes:
    temporaries: bytes a device beside the arguments; None if it did not say.
    text: the program; empty if it did not fit.
    error: why it did not fit; empty if it did.
  """

  temporaries: float | None
  text: str
  error: str


class Arguments(NamedTuple):
  """Shapes, dtypes and shardings of what a train step takes."""

  state: Any
  frozen: Any
  batch: Any
  key: Any


def prepare(topology: Topology) -> None:
  """Readies JAX for `make_mesh`, before it looks for devices.

  Args:
    topology: what shall be planned for.

  Raises:
    ImportError: if libtpu is needed and missing.
    ValueError: if JAX has already found its devices, and they are too few.
  """
  if topology.chip.platform == "tpu":
    if importlib.util.find_spec("libtpu") is None:
      raise ImportError(
        f"`--topology` {topology.name!r} needs TPU's compiler: `pip install"
        " libtpu`. No TPU is needed."
      )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without its chip, a TPU program cannot be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # What it decided before holds no more.
  try:
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform != "tpu":
      jax.config.update("jax_num_cpu_devices", topology.devices)
  except RuntimeError:  # JAX has been used: these devices, or not at all.
    pass
  fake = topology.chip.platform != "tpu"
  if fake and len(jax.devices("cpu")) < topology.devices:
    raise ValueError(
      f"`--topology` {topology.name!r} needs {topology.devices} fake CPU"
      f" devices, and JAX already runs with {len(jax.devices('cpu'))}. Plan in"
      " a process of its own."
    )


def mesh_shape(
  topology: Topology, shape: Mapping[str, int | None]
) -> dict[str, int]:
  """Returns the devices along each axis.

  Args:
    topology: which devices.
    shape: devices along the axes of `sharding.make_mesh`; 1 where left out,
      and `data` what the others leave.

  Raises:
    ValueError: if they are not as many as the topology has.
  """
  sizes = {axis: shape.get(axis) or 1 for axis in sharding.AXES}
  if shape.get("data") is None:
    sizes["data"] = max(1, topology.devices // math.prod(sizes.values()))
  if math.prod(sizes.values()) != topology.devices:
    raise ValueError(
      f"`mesh` must multiply to the {topology.devices} devices of"
      f" {topology.name}; got {sizes}. Set it, for instance with `--mesh"
      f" fsdp={topology.devices}`."
    )
  return sizes


def make_mesh(topology: Topology, shape: Mapping[str, int | None]) -> Mesh:
  """Returns a mesh of a topology's devices.

  Args:
    topology: which devices.
    shape: as for `mesh_shape`.

  Raises:
    ValueError: if they are not as many as the topology has, or libtpu does not
      know the topology.
  """
  sizes = tuple(mesh_shape(topology, shape).values())
  if topology.chip.platform == "tpu":
    devices = list(_tpu_devices(topology.name))
    grid = mesh_utils.create_device_mesh(
      sizes, devices, allow_split_physical_axes=True
    )
  else:
    devices = jax.devices("cpu")[: topology.devices]
    grid = np.array(devices).reshape(sizes)
  axis_types = (AxisType.Auto,) * len(sizes)
  return Mesh(grid, sharding.AXES, axis_types=axis_types)


@functools.cache
def _tpu_devices(name: str) -> tuple[Any, ...]:
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except Exception as error:  # whatever libtpu raises
    raise ValueError(
      f"`--topology` {name!r} must be a shape that libtpu knows; it says:"
      f" {str(error).splitlines()[0]}"
    ) from error
  return tuple(found.devices)


def arguments(stage: Stage, mesh: Mesh | AbstractMesh) -> Arguments:
  """Returns what the stage's steps take on a mesh, which may be abstract.

  Raises:
    ValueError: if the batch does not divide.
  """
  batch = stage.dataset.shapes()
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  examples = batch.x_0.shape[0]
  if examples % shards:
    raise ValueError(
      f"`config.data.batch_size` must divide by the {shards} devices of"
      f" `mesh.data` x `mesh.fsdp`; got {examples}."
    )
  by_rules = lambda tree: _place(tree, sharding.shard(tree, mesh, stage.rules))
  split = sharding.batch_sharding(mesh)
  key = jax.eval_shape(stage.run_key)
  return Arguments(
    state=by_rules(stage.state_shapes()),
    frozen=by_rules(stage.frozen_shapes()),
    batch=_place(batch, jax.tree.map(lambda _: split, batch)),
    key=_place(key, NamedSharding(mesh, PartitionSpec())),
  )


def compile_step(stage: Stage, phase: Phase, mesh: Mesh) -> Compiled:
  """Compiles one of a stage's steps for the devices of a mesh."""
  given = arguments(stage, mesh)
  where = jax.tree.map(lambda a: a.sharding, given)
  step = on_mesh(stage, mesh).train_steps(
    Shardings(where.state, where.frozen, where.batch)
  )[phase]
  options: Any = None
  if mesh.devices.flat[0].platform == "cpu":
    # Nothing will run: the machine code need not be good.
    options = {"xla_backend_optimization_level": 0}
  with jax.set_mesh(mesh):
    lowered = step.lower(*given)
    try:
      program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      return Compiled(_temporaries(str(error)), "", str(error).splitlines()[0])
  memory: Any = program.memory_analysis()
  return Compiled(float(memory.temp_size_in_bytes), program.as_text() or "", "")


def _temporaries(error: str) -> float | None:
  """Reads how much memory a program would have needed for temporaries."""
  found = re.search(r"(temporaries \(|HLO temp |Used )([\d.]+)([KMGT])", error)
  if found is None:
    return None
  return float(found[2]) * GIB * 1024.0 ** ("KMGT".index(found[3]) - 2)


def _place(tree: Any, where: Any) -> Any:
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, where
  )


def on_mesh(stage: Stage, mesh: Mesh) -> Stage:
  """Returns the stage whose networks split examples and heads over a mesh."""
  if mesh.size == 1:
    return stage

  def place(objective: Any) -> Any:
    fields = {field.name for field in dataclasses.fields(objective)}
    changes: dict[str, Any] = {
      role: _OnMesh(network.config, _Attention(mesh), mesh=mesh)
      for role in fields & {"student", "teacher", "real", "fake"}
      if isinstance(network := getattr(objective, role), models.Wan)
    }
    if "objectives" in fields:
      changes["objectives"] = tuple(map(place, objective.objectives))
    return dataclasses.replace(objective, **changes)

  placed = {phase: place(o) for phase, o in stage.objectives.items()}
  return dataclasses.replace(stage, objectives=placed)


@dataclasses.dataclass(frozen=True)
class _Attention:
  """Attention of each device's examples and heads: XLA splits no kernels."""

  mesh: Mesh

  def __call__(
    self,
    q: Array,
    k: Array | None,
    v: Array | None,
    *,
    context: Any = None,
    context_ranges: Array | None = None,
    **settings: Any,
  ) -> Array:
    def local(q, own, context, ranges):
      return kernels.attention(
        q, *own, context=context, context_ranges=ranges, **settings
      )

    split = PartitionSpec(("data", "fsdp"), None, "tensor")
    return jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(split, split, split, PartitionSpec()),
      out_specs=split,
    )(q, (k, v), context, context_ranges)


class _OnMesh(models.Wan):
  """A network whose tokens stay with their examples between layers."""

  mesh: Any = None

  def _scan(self, body: Any, carry: Any, xs: Any = None) -> Any:
    examples = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))

    def placed(block: Any, carry: Any, xs: Any) -> Any:
      keep = functools.partial(
        jax.lax.with_sharding_constraint, shardings=examples
      )
      return body(block, jax.tree.map(keep, carry), xs)

    return super()._scan(placed, carry, xs)
