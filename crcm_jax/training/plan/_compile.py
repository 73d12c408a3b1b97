"""A stage's train step, compiled for devices that are not there.

TPU programs are compiled by libtpu, the real compiler, without a TPU. In place
of GPUs as many fake CPU devices are used: memory and collectives are then an
estimate, since XLA splits the program alike but fuses it differently.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from crcm_jax.training import _mesh_checks, sharding
from crcm_jax.training._arguments import step_arguments
from crcm_jax.training._stages import Phase, Stage
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
    ValueError: if they are not as many as the topology has, or there is no
      such axis.
  """
  _mesh_checks.check_axes(shape)
  sizes = {axis: shape.get(axis, 1) for axis in sharding.AXES}
  return _mesh_checks.fill(
    sizes | {"data": shape.get("data")}, topology.devices
  )


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


def compile_step(stage: Stage, phase: Phase, mesh: Mesh) -> Compiled:
  """Compiles one of a stage's steps for the devices of a mesh."""
  given = step_arguments(stage, mesh)
  step = stage.on(mesh).train_steps(given.shardings())[phase]
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
