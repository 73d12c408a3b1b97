"""The backend "xla", unrolled and in loops."""

import backend_suite
import jax
import jax.numpy as jnp
import pytest

from crcm_jax import kernels


class TestUnrolled(backend_suite.BackendSuite):
  backend = kernels.Xla()


class TestLoops(backend_suite.BackendSuite):
  backend = kernels.Xla(block_queries=2, block_keys=3)


def _temporary_bytes(f, *shapes):
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  return (
    jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
  )


@pytest.fixture
def optimised():
  """Compiles as users do; see conftest.py."""
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("mode", ["jvp", "grad"])
def test_memory_grows_linearly(mode):
  """Four times the tokens take at most about four times the memory."""
  backend = kernels.Xla(block_queries=128, block_keys=128)

  def run(q, k, v):
    mask = kernels.BlockMask.block_causal(
      tuple(range(0, q.shape[1] + 1, q.shape[1] // 4))
    )
    attend = lambda q, k, v: kernels.attention(
      q, k, v, mask=mask, implementation=backend
    )
    if mode == "jvp":
      return jax.jvp(attend, (q, k, v), (v, q, k))
    return jax.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))(q, k, v)

  small, middle, large = (
    _temporary_bytes(run, *[(1, tokens, 1, 16)] * 3)
    for tokens in (1024, 2048, 4096)
  )
  assert middle <= 2.2 * small
  assert large <= 2.2 * middle
  assert large < 4096**2  # bytes: a quarter of one float32 score matrix


@pytest.mark.usefixtures("optimised")
def test_a_cache_is_not_copied():
  """Attending to a long cache takes memory for tiles of it alone."""

  def run(q, cache, ranges):
    return kernels.attention(
      q, q, q, context=(cache, cache), context_ranges=ranges
    )

  tokens = 64 * 1024
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype)
    for shape, dtype in (
      ((1, 64, 2, 16), jnp.float32),
      ((1, tokens, 2, 16), jnp.float32),
      ((1, 2), jnp.int32),
    )
  ]
  memory = jax.jit(run).lower(*shapes).compile().memory_analysis()
  assert memory.temp_size_in_bytes < memory.argument_size_in_bytes / 4
