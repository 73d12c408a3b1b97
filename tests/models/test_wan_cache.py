"""The cache is written in place, read in place, and never learns."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit

from crcm_jax import models

LAYERS, FRAMES = 8, 400
WIDE = dataclasses.replace(CONFIG, layers=LAYERS)
MODEL = models.Wan(WIDE)
X, T, TEXT, _ = tiny_wan.inputs(1, batch=1)
CHUNKS = models.WanChunks(MODEL, TEXT, height=4, width=4)


def compiled(function):
  """Compiles a use of a cache far larger than anything else."""
  params = jax.eval_shape(MODEL.init, jax.random.key(0), X, T, TEXT)["params"]
  cache = jax.eval_shape(lambda p: CHUNKS.init(p, 1, FRAMES), params)
  lowered = jax.jit(function, donate_argnums=3).lower(params, X, T, cache)
  past = sum(a.size * a.dtype.itemsize for a in cache.past)
  return lowered.compile().memory_analysis(), past


def test_append_writes_in_place():
  memory, past = compiled(CHUNKS.append)
  assert memory.alias_size_in_bytes >= past
  assert memory.temp_size_in_bytes < 2 * past / LAYERS


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_velocity_copies_nothing():
  memory, past = compiled(CHUNKS.velocity)
  assert memory.temp_size_in_bytes < 2 * past / LAYERS


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_gradient_copies_nothing():
  def loss(params, x, t, cache):
    return jnp.sum(CHUNKS.velocity(params, x, t, cache) ** 2)

  memory, past = compiled(jax.grad(loss))
  assert memory.temp_size_in_bytes < 0.5 * past


def test_append_is_detached():
  chunks = models.WanChunks(models.Wan(CONFIG), TEXT, height=4, width=4)

  @jit
  def gradient(params):
    def loss(params):
      cache = chunks.init(params, 1, 2)
      v, cache = chunks.append(params, X, T, cache)
      past = sum(jnp.sum(a) for a in cache.past)
      return jnp.sum(v) + past, cache

    return jax.grad(loss, has_aux=True)(params)

  grads, cache = gradient(tiny_wan.params())
  assert all(not g.any() for g in jax.tree.leaves(grads))
  assert cache.past.keys[:, :, :1].any()
  assert not cache.past.keys[:, :, 1:].any()
  assert int(cache.frames) == int(cache.position) == 1


def test_prompt_of_a_cache_learns():
  chunks = models.WanChunks(models.Wan(CONFIG), TEXT, height=4, width=4)

  @jit
  def gradient(params):
    def loss(params):
      cache = chunks.init(params, 1, 2)
      _, cache = chunks.append(params, X, T, cache)
      return jnp.sum(cache.text.keys)

    return jax.grad(loss)(params)

  grads = gradient(tiny_wan.params())
  assert grads["text_embedding"]["up"]["kernel"].any()


def test_cache_messages(unchecked):
  params = tiny_wan.params()
  chunks = models.WanChunks(models.Wan(CONFIG), TEXT, height=4, width=4)
  with pytest.raises(ValueError, match=r"`text` .* \(2, 3, 6\).*got \(1, 3, 6"):
    chunks.init(params, 2, 3)
  cache = chunks.init(params, 1, 1)
  x, t, _, _ = tiny_wan.inputs(2, batch=1)
  with pytest.raises(ValueError, match=r"`cache` .* room for 1 frames of 4 "):
    chunks.velocity(params, x, t, cache)
