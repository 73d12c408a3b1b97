"""Guidance of chunk models: each branch keeps its own cache."""

import jax
import jax.numpy as jnp
import numpy as np
from toy_chunks import PARAMS, ToyChunks

from crcm_jax import sampling


class Captioned(ToyChunks):
  """A toy whose cache holds a caption of its own."""

  def __init__(self, caption):
    super().__init__()
    self.caption = caption

  def init(self, params, batch, frames):
    past = super().init(params, batch, frames)
    return past._replace(caption=jnp.array(self.caption))


def test_each_branch_reads_its_own_cache():
  toy = ToyChunks()
  model = sampling.guided(Captioned(2.0), Captioned(0.5), 3.0)
  x = jax.random.normal(jax.random.key(0), (1, 2, *toy.shape))
  t = jnp.full((1, 2), 0.5)
  cache = model.init(PARAMS, 1, 4)
  empty = toy.init(PARAMS, 1, 4)._replace(caption=jnp.array(0.0))
  guided = 0.5 + 3 * (2.0 - 0.5)
  np.testing.assert_allclose(
    model.velocity(PARAMS, x, t, cache),
    toy.velocity(PARAMS, x, t, empty) + guided,
    rtol=1e-5,
  )
  v, cache = model.append(PARAMS, x, t, cache)
  np.testing.assert_allclose(
    v, toy.velocity(PARAMS, x, t, empty) + guided, rtol=1e-5
  )
  assert (float(cache[0].caption), float(cache[1].caption)) == (2.0, 0.5)
