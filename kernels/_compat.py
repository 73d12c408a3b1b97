"""The JAX internals that attention's own primitives need, in one place.

These names are the same in JAX 0.10 to 0.12, but carry no promise of stability.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive as Primitive
from jax.interpreters import ad as ad
from jax.interpreters import batching as batching
from jax.interpreters import mlir as mlir
from jax.interpreters import partial_eval as pe
from jax.sharding import NamedSharding, PartitionSpec

partial_eval_rules = pe.custom_partial_eval_rules
remat_rules = pe.partial_eval_jaxpr_custom_rules


def set_dce_rule(prim, rule):
  """Sets `rule(used_outputs, eqn)`; JAX 0.12 passes live inputs between."""
  pe.dce_rules[prim] = lambda used, *rest: rule(used, rest[-1])


def with_axes(aval, axes, dtype):
  """An abstract value made of some axes of another."""
  spec = tuple(aval.sharding.spec)
  spec += (None,) * (aval.ndim - len(spec))
  return aval.update(
    shape=tuple(aval.shape[i] for i in axes),
    dtype=dtype,
    weak_type=False,
    sharding=NamedSharding(
      aval.sharding.mesh, PartitionSpec(*(spec[i] for i in axes))
    ),
  )


def zero_tangent(x):
  """The symbolic zero that is the tangent of `x`."""
  return ad.Zero(jax.typeof(x).to_tangent_aval())


def _varying(x) -> frozenset:
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def same_varying(*arrays):
  """Marks arrays inside a `shard_map` as varying over the same mesh axes."""
  axes = frozenset().union(*map(_varying, arrays))
  return [vary_like(x, axes) for x in arrays]


def vary_like(x, like):
  """Marks `x` as varying over the mesh axes that `like` varies over."""
  axes = like if isinstance(like, frozenset) else _varying(like)
  missing = tuple(axes - _varying(x))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def target_platform() -> str:
  """Where the program being traced will run: "cpu", "gpu" or "tpu".

  A mesh in context decides, so that programs can be compiled ahead of time for
  devices that are not there; without one, JAX's default backend.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return getattr(device, "platform", None) or jax.default_backend()


# XLA of earlier releases gathers from all devices what it is asked to lay out.
_LAYOUTS_ARE_PARTITIONED = jax.__version_info__ >= (0, 11, 2)


def row_major(x):
  """Asks a GPU's compiler to keep the last axis of `x` together in memory."""
  if target_platform() != "gpu" or not _LAYOUTS_ARE_PARTITIONED:
    return x
  return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def struct_like(shape, dtype, like):
  """The type of a kernel's output that varies over the mesh axes of `like`."""
  varying = jax.typeof(like).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
