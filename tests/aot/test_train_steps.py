"""Whole train steps compile for TPUs, ahead of time and without one.

libtpu's compiler is the real one: what does not fit the chip's memory, or does
not lower, fails here. Only one process may use it at a time.
"""

import jax
import launches
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from crcm_jax.training import load_config, read_experiment, sharding

pytestmark = pytest.mark.aot


def one_chip(topology):
  """A mesh of the first chip of a topology."""
  description = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  chip = np.array(description.devices[:1]).reshape((1,) * len(sharding.AXES))
  return Mesh(chip, sharding.AXES)


def compile_step(stage, phase, mesh):
  everywhere = NamedSharding(mesh, PartitionSpec())
  place = lambda tree: jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), tree
  )
  state = place(stage.state_shapes())
  frozen = {role: state.student for role in stage.kind.frozen}
  key = place(jax.eval_shape(jax.random.key, 0))
  step = stage.train_steps()[phase]
  with jax.set_mesh(mesh):
    return step.lower(
      state, frozen, place(stage.dataset.shapes()), key
    ).compile()


@pytest.fixture(scope="module")
def stages():
  config = load_config("experiments/configs/moving_digits.py:from_scratch")
  return read_experiment(config).stages


GRADIENT = {"forward", "dq", "dkv"}


@pytest.mark.parametrize(
  ("name", "topology", "kernels"),
  [
    ("consistency", "v5e:2x2", GRADIENT | {"fused"}),
    ("consistency", "v6e:2x2", GRADIENT | {"fused"}),
    ("self_forcing", "v5p:2x2x1", GRADIENT),
  ],
)
def test_a_student_step_compiles(stages, name, topology, kernels):
  compiled = compile_step(stages[name], "student", one_chip(topology))
  assert launches.compiled(compiled) == kernels
  assert compiled.cost_analysis()["flops"] > 1e9
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes > 0  # the state is updated in place
  assert memory.temp_size_in_bytes < 4e9
