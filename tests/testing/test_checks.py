"""The public checks pass good models and refuse bad ones, readably."""

import jax
import jax.numpy as jnp
import pytest

from crcm_jax import testing
from crcm_jax.chunks import ChunkPattern

PATTERN = ChunkPattern(1, 2)
X = jax.random.normal(jax.random.key(0), (1, 5, 2))
T = jnp.full((1, 5), 0.5)


def smooth(x, t):
  return jnp.sin(x) * t[..., None] + x**2


@jax.custom_jvp
def mistaken(x):
  return jnp.sin(x)


mistaken.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), tangents[0]))


def test_a_true_tangent_passes():
  report = testing.check_tangent(smooth, X, T, jnp.cos(X))
  assert report.passed
  assert "agrees with central differences" in str(report)
  with jax.enable_x64(True):
    x, t = X.astype(jnp.float64), T.astype(jnp.float64)
    testing.check_tangent(smooth, x, t, jnp.cos(x), tolerance=1e-6)


def test_a_wrong_or_non_finite_tangent_is_refused():
  wrong = lambda x, t: mistaken(x) * t[..., None]
  with pytest.raises(AssertionError, match="DISAGREES with central"):
    testing.check_tangent(wrong, X, T, jnp.ones_like(X))
  broken = lambda x, t: smooth(x, t) + jnp.sqrt(0 * x**2)
  with pytest.raises(AssertionError, match="tangent of norm nan DISAGREES"):
    testing.check_tangent(broken, X, T, jnp.ones_like(X))


def causal(x, strict=False):
  chunk = PATTERN.chunk_of_frame(5)
  sees = chunk[:, None] > chunk if strict else chunk[:, None] >= chunk
  return jnp.einsum("fg,bgc->bfc", jnp.asarray(sees, x.dtype), jnp.sin(x))


def test_block_causal_models_pass():
  report = testing.check_block_causal(causal, X, PATTERN)
  assert report.influence.shape == (3, 3)
  testing.check_block_causal(
    lambda x: causal(x, strict=True), X, PATTERN, strict=True
  )


def test_leaks_from_the_future_are_refused():
  leak = lambda x: causal(x) + 1e-3 * x.sum(axis=1, keepdims=True)
  with pytest.raises(AssertionError, match=r"is NOT block-causal(.|\n)*!"):
    testing.check_block_causal(leak, X, PATTERN)
  with pytest.raises(AssertionError, match="is NOT strictly block-causal"):
    testing.check_block_causal(causal, X, PATTERN, strict=True)
  with pytest.raises(AssertionError, match="is NOT block-causal"):
    testing.check_block_causal(jnp.zeros_like, X, PATTERN)


class Summing:
  """A chunk model whose velocity adds the sum of its history."""

  def init(self, params, batch, frames):
    del params, frames
    return jnp.zeros((batch, 1, 2))

  def velocity(self, params, x, t, cache):
    return params * x + t[..., None] + cache

  def append(self, params, x, t, cache):
    v = self.velocity(params, x, t, cache)
    return v, cache + x.sum(axis=1, keepdims=True)


def test_cached_models_are_compared_with_their_parallel_form():
  context = jnp.cos(X)
  history = causal(jnp.arcsin(context), strict=True)
  parallel = lambda x, t: 2 * x + t[..., None] + history
  arguments = (Summing(), jnp.array(2.0), X, T, context, PATTERN)
  report = testing.check_cache_parity(parallel, *arguments)
  assert len(report.errors) == 3
  forgetful = lambda x, t: 2 * x + t[..., None]
  with pytest.raises(AssertionError, match="the cached pass DISAGREES"):
    testing.check_cache_parity(forgetful, *arguments)
