"""The cache is written in place, read in place, and never learns."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit

from crcm_jax import models
from crcm_jax.models import _cache

LAYERS, FRAMES = 8, 400
WIDE = dataclasses.replace(CONFIG, layers=LAYERS)
MODEL = models.Wan(WIDE)
X, T, TEXT, _ = tiny_wan.inputs(1, batch=1)
CHUNKS = models.WanChunks(MODEL, TEXT, height=4, width=4)


def _arguments():
  """A use of a cache far larger than anything else, and its elements."""
  params = jax.eval_shape(MODEL.init, jax.random.key(0), X, T, TEXT)["params"]
  cache = jax.eval_shape(lambda p: CHUNKS.init(p, 1, FRAMES), params)
  return (params, X, T, cache), sum(a.size for a in cache.past)


def compiled(function):
  """Compiles a use of such a cache; returns its memory, and the cache's."""
  arguments, elements = _arguments()
  lowered = jax.jit(function, donate_argnums=3).lower(*arguments)
  return lowered.compile().memory_analysis(), 4 * elements


def test_append_writes_in_place():
  memory, past = compiled(CHUNKS.append)
  assert memory.alias_size_in_bytes >= past
  assert memory.temp_size_in_bytes < 2 * past / LAYERS


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_velocity_copies_nothing():
  memory, past = compiled(CHUNKS.velocity)
  assert memory.temp_size_in_bytes < 2 * past / LAYERS


@pytest.fixture
def as_on_gpu(monkeypatch):
  """Lets layers read the cache as they do where kernels read memory."""
  monkeypatch.setattr(_cache, "target_platform", lambda: "gpu")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_no_layer_copies_its_part_of_a_cache(as_on_gpu):
  for use in (CHUNKS.velocity, CHUNKS.append):
    traced = jax.jit(use).trace(*_arguments()[0])
    (scan,) = [e for e in traced.jaxpr.eqns if e.primitive.name == "scan"]
    body = scan.params["jaxpr"].jaxpr
    slices = body.invars[scan.params["num_consts"] + scan.params["num_carry"] :]
    used = {id(a) for e in body.eqns for a in e.invars}
    large = [a for a in slices if a.aval.size > _arguments()[1] / 100 / LAYERS]
    assert len(large) == 2  # of keys and values, and no layer looks at them
    assert not any(id(a) in used for a in large)
  memory, past = compiled(CHUNKS.append)
  assert memory.alias_size_in_bytes >= past
  assert memory.temp_size_in_bytes < past / LAYERS


def test_a_layer_finds_its_part_of_a_cache(as_on_gpu, monkeypatch):
  """Video, keys, values and gradients are those of the cut cache."""
  x, t, text, _ = tiny_wan.inputs(2, batch=1)
  chunks = models.WanChunks(models.Wan(CONFIG), text, height=4, width=4)

  def loss(params):
    cache = chunks.init(params, 1, 4)
    _, cache = chunks.append(params, x, 0 * t, cache)
    v, cache = chunks.append(params, x, t, cache)
    v_2 = chunks.velocity(params, x[:, :1], t[:, :1], cache)
    return jnp.sum(v_2**2), (v, v_2, cache.past)

  run = lambda: jit(lambda p: jax.value_and_grad(loss, has_aux=True)(p))(
    tiny_wan.params()
  )
  got = run()
  monkeypatch.undo()
  for a, b in zip(*map(jax.tree.leaves, (got, run())), strict=True):
    assert tiny_wan.relative(a, b) < 1e-5


@pytest.mark.parametrize(
  "shape", [(2, 2, 6, 2, 4), (40, 1, 32760, 40, 128)], ids=["videos", "huge"]
)
def test_a_cache_of_more_than_a_kernel_counts_is_cut(shape, as_on_gpu):
  keys = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  past = _cache.KeysValues(keys, keys)
  assert jax.eval_shape(_cache._as_one_sequence, past) is None


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
