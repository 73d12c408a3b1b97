"""Layers that lie apart compute what stacked ones do, in every mode."""

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit

from crcm_jax import models
from crcm_jax.chunks import ChunkPattern

MODEL = models.Wan(CONFIG)
X, T, TEXT, CLEAN = tiny_wan.inputs(3)
PATTERN = ChunkPattern(1, 2)
CHUNKS = models.WanChunks(MODEL, TEXT, height=4, width=4)


def whole(params, **settings):
  return MODEL.apply({"params": params}, X, T, TEXT, **settings)


def cached(params):
  """Commits the first frame, and asks for the next two."""
  cache = CHUNKS.init(params, 2, 3)
  first, cache = CHUNKS.append(params, X[:, :1], T[:, :1], cache)
  return first, CHUNKS.velocity(params, X[:, 1:], T[:, 1:], cache), cache.past


MODES = {
  "bidirectional": whole,
  "teacher forcing": functools.partial(whole, pattern=PATTERN, context=CLEAN),
  "cached": cached,
}


@pytest.mark.parametrize("mode", MODES)
def test_apart_or_stacked_is_the_same(mode):
  params = tiny_wan.params()

  def loss(params, change):
    out = MODES[mode](change(params))
    return sum(jnp.sum(a * a) for a in jax.tree.leaves(out)), out

  run = jit(jax.grad(loss, has_aux=True), static_argnums=1)
  want = run(params, lambda params: params)
  got = run(params, models.unstack_layers)
  assert tiny_wan.relative(got, want) < 1e-5


def test_a_program_of_layers_apart_has_no_scan():
  params = models.unstack_layers(tiny_wan.params())
  assert "scan" in str(jax.make_jaxpr(whole)(tiny_wan.params()))
  assert "scan" not in str(jax.make_jaxpr(whole)(params))
