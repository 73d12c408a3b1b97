"""What a stage's train steps take, before any of it is there."""

from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from crcm_jax.training import _mesh_checks, sharding
from crcm_jax.training._stages import Stage
from crcm_jax.training._step import Shardings


class StepArguments(NamedTuple):
  """Shapes, dtypes and shardings of what a train step takes."""

  state: Any
  frozen: Any
  batch: Any
  key: Any

  def shardings(self) -> Shardings:
    """Returns where they lie, for `Stage.train_steps`."""
    where = jax.tree.map(lambda a: a.sharding, self)
    return Shardings(where.state, where.frozen, where.batch)


def step_arguments(stage: Stage, mesh: Mesh | AbstractMesh) -> StepArguments:
  """Returns what the steps of a stage take on a mesh, to compile them for it.

  Args:
    stage: whose steps; they are those of `stage.on(mesh)`.
    mesh: the devices, which need not be there.

  Raises:
    ValueError: if the batch does not divide.

  Example:
    >>> given = step_arguments(stage, mesh)  # doctest: +SKIP
    >>> steps = stage.on(mesh).train_steps(  # doctest: +SKIP
    ...   given.shardings())
    >>> with jax.set_mesh(mesh):  # doctest: +SKIP
    ...   program = steps["student"].lower(*given).compile()
  """
  batch = stage.dataset.shapes()
  _mesh_checks.check_batch(
    mesh.shape, batch.x_0.shape[0], stage.loop.micro_batches
  )
  by_rules = lambda tree: sharding.with_shardings(
    tree, sharding.shard(tree, mesh, stage.rules)
  )
  split = sharding.batch_sharding(mesh)
  key = jax.eval_shape(stage.run_key)
  return StepArguments(
    state=by_rules(stage.state_shapes()),
    frozen=by_rules(stage.frozen_shapes()),
    batch=sharding.with_shardings(batch, jax.tree.map(lambda _: split, batch)),
    key=sharding.with_shardings(key, NamedSharding(mesh, PartitionSpec())),
  )
