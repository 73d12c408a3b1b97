"""What a rollout keeps constant stays so, whatever the model lets through."""

import jax
import jax.numpy as jnp
import numpy as np
from quick_jit import quick_jit
from toy_chunks import PARAMS, ToyChunks

from crcm_jax import sampling
from crcm_jax.chunks import ChunkPattern

PATTERN = ChunkPattern(1, 2)
NOISE = jax.random.normal(jax.random.key(0), (2, 2, 5, 2, 2, 1))
TIMES, COUNTS = sampling.chunk_times([(1.0, 0.5, 0.0)], 3)


class Leaky(ToyChunks):
  """Commits what depends on the parameters, and stops nothing."""

  def append(self, params, x, t, cache):
    v, past = super().append(params, x, t, cache)
    return v, past._replace(x=(1 + params["w"]) * past.x)


def loss(video):
  return jnp.sum(jnp.sin(video) ** 2)


def test_committed_chunks_are_constant_for_a_model_that_stops_nothing():
  run = lambda p: sampling.rollout(Leaky(), p, NOISE, PATTERN, TIMES, COUNTS)
  made = quick_jit(run)(PARAMS)
  grads = quick_jit(jax.grad(lambda p: loss(run(p).video)))(PARAMS)
  # x_0 = x - t (w x + ..), where x, t and the past are constants.
  d_x_0 = jax.grad(loss)(made.video) * -made.last_t[..., None, None, None]
  np.testing.assert_allclose(
    grads["w"], jnp.sum(d_x_0 * made.last_input), rtol=1e-4
  )


def test_a_replay_holds_the_rollout_constant():
  made = quick_jit(
    lambda: sampling.rollout(ToyChunks(), PARAMS, NOISE, PATTERN, TIMES, COUNTS)
  )()

  def replayed(last_input):
    changed = made._replace(last_input=last_input)
    return loss(sampling.replay(ToyChunks(), PARAMS, changed, PATTERN))

  grad = quick_jit(jax.grad(replayed))(made.last_input)
  np.testing.assert_array_equal(grad, 0)
