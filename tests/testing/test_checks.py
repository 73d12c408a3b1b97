"""The public checks pass good models and refuse bad ones, readably."""

import jax
import jax.numpy as jnp
import pytest

from crcm_jax import testing
from crcm_jax.chunks import ChunkPattern

PATTERN = ChunkPattern(1, 2)
X = jax.random.normal(jax.random.key(0), (1, 5, 2))
T = jnp.full((1, 5), 0.5)


def smooth(params, x, t):
  return jnp.sin(params["w"] * x) * t[..., None] + x**2


PARAMS = {"w": jnp.array([[[1.5, -0.5]]])}


@jax.custom_jvp
def mistaken(x):
  return jnp.sin(x)


mistaken.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), tangents[0]))


def test_a_true_tangent_passes():
  report = testing.check_tangent(smooth, PARAMS, X, T, jnp.cos(X))
  assert report.passed
  assert "agrees with central differences" in str(report)
  assert report.float64_error < 1e-6
  with jax.enable_x64(True):
    params = {"w": PARAMS["w"].astype(jnp.float64)}
    x, t = X.astype(jnp.float64), T.astype(jnp.float64)
    arguments = (smooth, params, x, t, jnp.cos(x))
    testing.check_tangent(*arguments, tolerance=1e-6)


def test_a_wrong_or_non_finite_tangent_is_refused():
  wrong = lambda p, x, t: mistaken(x) * t[..., None]
  with pytest.raises(AssertionError, match="DISAGREES with central"):
    testing.check_tangent(wrong, PARAMS, X, T, jnp.ones_like(X))
  broken = lambda p, x, t: smooth(p, x, t) + jnp.sqrt(0 * x**2)
  with pytest.raises(AssertionError, match="tangent of norm nan DISAGREES"):
    testing.check_tangent(broken, PARAMS, X, T, jnp.ones_like(X))


def test_what_low_precision_costs_a_tangent_is_reported():
  params, x, t = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (PARAMS, X, T))
  report = testing.check_tangent(
    smooth, params, x, t, jnp.cos(x), tolerance=0.1
  )
  assert 1e-4 < report.float64_error < 3e-2
  with pytest.raises(AssertionError, match=r"float64 .*e-0[23]$"):
    testing.check_tangent(smooth, params, x, t, jnp.cos(x), tolerance=1e-4)


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


def squares(params, x, noise):
  return jnp.square(params * x - noise["e"]).sum(axis=(1, 2)), "metrics"


def test_losses_of_single_examples_pass():
  x = jnp.concatenate([X, 2 * X, 3 * X])
  batch = (x, {"e": jnp.cos(x)})
  report = testing.check_loss_is_per_example(squares, jnp.array(0.3), *batch)
  assert len(report.loss_errors) == len(report.gradient_errors) == 3
  assert "ignores the rest of its batch" in str(report)


def test_losses_that_mix_examples_are_refused():
  x = jnp.concatenate([X, 2 * X])
  batch = (jnp.array(0.3), x, {"e": jnp.cos(x)})

  def normalised(params, *batch):
    loss, _ = squares(params, *batch)
    return loss / jax.lax.stop_gradient(loss.max())

  with pytest.raises(AssertionError, match="DEPENDS ON the rest of its batch"):
    testing.check_loss_is_per_example(normalised, *batch)

  def in_gradient_alone(params, *batch):
    loss, _ = squares(params, *batch)
    return loss + params * (loss.mean() - jax.lax.stop_gradient(loss.mean()))

  with pytest.raises(AssertionError, match=r"0\.0e\+00  \d") as error:
    testing.check_loss_is_per_example(in_gradient_alone, *batch)
  assert "DEPENDS ON" in str(error.value)


def test_losses_that_are_no_losses_of_examples_are_refused():
  batch = (X, {"e": X})
  with pytest.raises(ValueError, match="`batch` must hold at least two"):
    testing.check_loss_is_per_example(squares, jnp.array(0.3), *batch)
  averaged = lambda *batch: squares(*batch)[0].mean()
  two = jax.tree.map(lambda a: jnp.concatenate([a, a]), batch)
  with pytest.raises(ValueError, match=r"one value for each example, \(2,\)"):
    testing.check_loss_is_per_example(averaged, jnp.array(0.3), *two)
