"""Attention over a mesh is attention, in value, tangent and gradient."""

import eight_devices
import jax.numpy as jnp
import pytest

from crcm_jax import kernels
from crcm_jax.training import sharding


@pytest.mark.parametrize(
  "mesh",
  [
    "1x1x8x1",  # 12 heads: 4 neighbours swap, 2 groups gather
    pytest.param("1x1x4x2", marks=pytest.mark.slow),  # 6 heads a shard: 2 x 2
    pytest.param("1x1x2x4", marks=pytest.mark.slow),  # 3 heads: all gathered
    pytest.param("2x2x2x1", marks=pytest.mark.slow),  # all swapped
    pytest.param("4x2x1x1", marks=pytest.mark.slow),  # nothing moves
  ],
)
def test_attention_over_a_mesh_equals_that_of_one_device(mesh):
  rows = eight_devices.run("parallel_attention", mesh)
  far = {row["case"]: row["far"] for row in rows}
  assert len(far) == 11
  assert max(far.values()) < 1e-5, far


def test_one_device_needs_no_exchange():
  attention = sharding.ParallelAttention(sharding.make_mesh(devices=1))
  q = jnp.arange(48.0).reshape(1, 2, 3, 2, 4) / 48
  mask = kernels.BlockMask.block_causal((0, 3, 6))
  want = kernels.attention(q, q, q, mask=mask)
  assert jnp.array_equal(attention(q, q, q, mask=mask), want)
