"""The backend "triton" on the host: its kernels through Triton's interpreter.

That they compile for GPUs is test_triton_compile.py; that they are right and
fast there, test_triton_gpu.py and benchmarks/attention.py.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton decorates a kernel

import backend_suite
import jax
import jax.numpy as jnp
import pytest
import triton_interpreter

from crcm_jax import kernels


class TestInterpreted(backend_suite.BackendSuite):
  backend = kernels.Triton(launcher=triton_interpreter.interpret)
  half = jnp.float16  # the interpreter multiplies bits of bfloat16 as integers

  @pytest.mark.parametrize("seed", range(6))
  def test_random_problem(self, seed):
    dtype = [jnp.float32, jnp.float16][seed % 2]
    backend_suite.check_random_problem(self.backend, seed, dtype, 3)

  def test_float64(self):
    """Refused by name, unless nobody asked for this backend."""
    q = jnp.ones((1, 4, 2, 8), jnp.float16)
    kernels.attention(q, q, q, implementation=self.backend)
    with pytest.raises(NotImplementedError, match="'xla'"):
      kernels.attention(
        jnp.ones((1, 4, 2, 257)),
        *2 * [jnp.ones((1, 4, 2, 257))],
        implementation=self.backend,
      )


@pytest.mark.parametrize("name", ["cached", "noisy", "nothing_cached", "blind"])
def test_keys_split_over_programs(name):
  """Three programs share the keys of each tile; their outputs are merged."""
  walk = dict(block=16, warps=4, stages=1)
  kinds = ("forward", "fused", "query_gradient", "key_gradient")
  backend = kernels.Triton(
    splits=3,
    launcher=triton_interpreter.interpret,
    block_sizes=kernels.BlockSizes.from_dict(
      dict(queries=16, keys=16, **dict.fromkeys(kinds, walk))
    ),
  )
  few = backend_suite.CASES[name]
  times = lambda spans: tuple((16 * a, 16 * b) for a, b in spans)
  mask = few.mask and kernels.BlockMask(
    tuple(
      kernels.Row(times([row.queries])[0], times(row.keys))
      for row in few.mask.rows
    ),
    16 * few.mask.num_keys,
  )
  case = backend_suite.Case(
    16 * few.s, 16 * few.z, 16 * few.y, mask, times(few.ranges)
  )
  x = backend_suite.arrays(case)
  o, grad = jax.jit(
    jax.value_and_grad(
      lambda q: (backend_suite.call(case, backend, q, *x[1:]) ** 2).sum()
    )
  )(x[0])
  want, _, _ = backend_suite.expected(case, x)
  backend_suite.close(o, (want**2).sum())
  backend_suite.close(
    grad, backend_suite.expected(case, x, do=2 * want)[2][0], 4e-6
  )
