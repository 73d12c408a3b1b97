"""Tests of a model and a loss of your own: copy this file and replace the top.

    pytest examples/test_my_model.py

The model here is the smallest causal one: a frame reads itself, its time, and
the mean of the clean frames in earlier chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import ChunkPattern, losses, testing

PATTERN = ChunkPattern(1, 2)
BATCH, FRAMES, SIZE = 3, 5, 4


# Your model, in its parallel form, ...


def my_velocity(params, x, t, context):
  """Returns the velocity of noisy frames given the clean video."""
  chunk = PATTERN.chunk_of_frame(FRAMES)
  earlier = (chunk[:, None] > chunk).astype(np.float32)
  earlier /= np.maximum(earlier.sum(axis=1, keepdims=True), 1)
  past = jnp.einsum("fg,bgs->bfs", jnp.asarray(earlier, x.dtype), context)
  return _layer(params, x, past, t)


def _layer(params, x, past, t):
  h = x @ params["x"] + past @ params["past"] + t[..., None] * params["t"]
  return jnp.tanh(h)


# ... and chunk by chunk with a cache, as `sampling.rollout` calls it.


class Past(NamedTuple):
  """The sum of the committed frames, and their number."""

  total: jax.Array
  frames: jax.Array


class MyChunks:
  """A `sampling.ChunkModel`."""

  def init(self, params, batch, frames):
    """Returns an empty cache."""
    del params, frames
    return Past(jnp.zeros((batch, 1, SIZE)), jnp.array(0.0))

  def velocity(self, params, x, t, cache):
    """Returns a chunk's velocity given the past."""
    past = cache.total / jnp.maximum(cache.frames, 1)
    return _layer(params, x, jnp.broadcast_to(past, x.shape), t)

  def append(self, params, x, t, cache):
    """Commits a chunk."""
    v = self.velocity(params, x, t, cache)
    total = cache.total + x.sum(axis=1, keepdims=True)
    return v, Past(total, cache.frames + x.shape[1])


def my_loss(velocity, params, teacher, x_0, noise, t):
  """Your loss; here the library's."""
  return losses.continuous_consistency_loss(
    velocity, params, teacher, x_0, noise, t
  )


# What follows can stay as it is.

KEYS = list(jax.random.split(jax.random.key(0), 7))
PARAMS = {
  "x": 0.5 * jax.random.normal(KEYS[0], (SIZE, SIZE)),
  "past": 0.5 * jax.random.normal(KEYS[1], (SIZE, SIZE)),
  "t": jax.random.normal(KEYS[2], (1, 1, SIZE)),
}
X_0, NOISE, DIRECTION = (
  jax.random.normal(key, (BATCH, FRAMES, SIZE)) for key in KEYS[3:6]
)
T = jax.random.uniform(KEYS[6], (BATCH, FRAMES), minval=0.3, maxval=0.7)
TEACHER = testing.GaussianTeacher(np.ones(SIZE), np.diag([0.2, 0.5, 1.0, 2.0]))


def test_the_tangent_is_right_and_precise_enough():
  """A custom gradient rule or a low precision would spoil it."""
  velocity = lambda p, x, t: my_velocity(p, x, t, X_0)
  testing.check_tangent(velocity, PARAMS, NOISE, T, DIRECTION)


def test_no_chunk_sees_its_own_clean_frames_or_later_ones():
  """Teacher forcing leaks the answer otherwise."""
  past = lambda context: my_velocity(PARAMS, NOISE, T, context)
  testing.check_block_causal(past, X_0, PATTERN, strict=True)
  own = lambda x: my_velocity(PARAMS, x, T, X_0)
  testing.check_block_causal(own, NOISE, PATTERN)


def test_the_cache_gives_what_training_gave():
  """A student must meet at inference what it was trained on."""
  parallel = lambda x, t: my_velocity(PARAMS, x, t, X_0)
  testing.check_cache_parity(
    parallel, MyChunks(), PARAMS, NOISE, T, X_0, PATTERN
  )


def test_the_loss_ignores_the_rest_of_the_batch():
  """A normaliser over the batch would weigh examples by each other."""

  def loss(params, x_0, noise, t):
    velocity = lambda p, x, t: my_velocity(p, x, t, x_0)
    return my_loss(velocity, params, TEACHER.velocity, x_0, noise, t)

  testing.check_loss_is_per_example(loss, PARAMS, X_0, NOISE, T)


def test_the_loss_vanishes_at_the_true_consistency_function():
  """The one network that a consistency loss may not move."""
  exact = lambda offset, x, t: TEACHER.consistency_velocity(x, t) + offset

  def loss(offset):
    return my_loss(exact, offset, TEACHER.velocity, X_0, NOISE, T)[0]

  np.testing.assert_allclose(loss(0.0), 0, atol=1e-6)
  assert (loss(0.1) > 0.01).all()
