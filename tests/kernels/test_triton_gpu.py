"""The backend "triton" on an NVIDIA GPU: `pytest -m gpu tests/kernels`."""

import backend_suite
import jax.numpy as jnp
import pytest

from crcm_jax import kernels

pytestmark = pytest.mark.gpu


class TestTriton(backend_suite.BackendSuite):
  backend = kernels.Triton()
  half = jnp.bfloat16

  @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
  @pytest.mark.parametrize("seed", range(20))
  def test_random_problem(self, seed, dtype):
    backend_suite.check_random_problem(self.backend, seed, jnp.dtype(dtype))

  def test_float64(self):
    """Not supported; the default falls back. See test_triton.py."""


def test_default_is_triton():
  """The default on a GPU, without a fallback's warning."""
  q = jnp.ones((1, 32, 2, 64), jnp.bfloat16)
  assert kernels.attention(q, q, q).shape == q.shape
