"""Attention over two devices, in a process of its own."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from crcm_jax import kernels

mesh = Mesh(np.array(jax.devices()), ("x",), (AxisType.Auto,))
mask = kernels.BlockMask.noisy_rows((0, 3, 8))
x = [jax.random.normal(k, (2, 8, 2, 4))
     for k in jax.random.split(jax.random.key(0), 5)]
x[3:] = [a[:1] for a in x[3:]]  # one context, shared by both examples


def attend(q, k, v, *context):
  context = tuple(jnp.broadcast_to(c, (len(q), *c.shape[1:])) for c in context)
  return kernels.attention(q, k, v, context=context, mask=mask)


specs = (P("x"), P("x"), P("x"), P(), P())
for check_vma in (True, False):
  sharded = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=P("x"),
                          check_vma=check_vma)
  for f in (
    lambda f: jax.jvp(f, x, x[:3] + x[3:]),
    lambda f: jax.grad(lambda *x: (f(*x) ** 2).sum(), range(5))(*x),
  ):
    for a, b in zip(jax.tree.leaves(jax.jit(lambda: f(sharded))()),
                    jax.tree.leaves(jax.jit(lambda: f(attend))())):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

# Query rows dealt out to the devices, keys whole: context parallelism.
causal = kernels.BlockMask.block_causal((0, 4, 8))
shard, other = causal.shard_rows(2)
assert shard == other
deal = lambda a: a.reshape(2, 4, 2, 2, 4).swapaxes(1, 2).reshape(2, 8, 2, 4)
rows = jax.shard_map(
  lambda q, k, v: kernels.attention(q, k, v, mask=shard), mesh=mesh,
  in_specs=(P(None, "x"), P(), P()), out_specs=P(None, "x"))
o = jax.jit(rows)(deal(x[0]), *x[1:3])
np.testing.assert_allclose(
  o, deal(kernels.attention(*x[:3], mask=causal)), rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_two_devices_equal_one():
  environment = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }
  subprocess.run(
    [sys.executable, "-c", PROGRAM], check=True, env=environment, timeout=300
  )
