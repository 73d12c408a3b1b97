"""Jumps of an exact mean velocity land on the flow map, however many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_chunks import PARAMS, ToyChunks

from crcm_jax import ChunkPattern, sampling
from crcm_jax.testing import GaussianTeacher

TEACHER = GaussianTeacher(np.ones((1, 1, 2)), [[0.5, 0.2], [0.2, 0.3]])
TIMES = (0.9, 0.6, 0.3, 0.0)
PATTERN = ChunkPattern(1, 2)


class Exact:
  """Frames are Gaussian and know no past."""

  def init(self, params, batch, frames):
    return ()

  def velocity(self, params, x, t, cache):
    return TEACHER.consistency_velocity(x, t)

  def mean_velocity(self, params, x, t, end_time, cache):
    jump = x - TEACHER.flow_map(x, t, end_time)
    return jump / (t - end_time)[..., None, None, None]

  def append(self, params, x, t, cache):
    return x, cache

  def rewind(self, params, cache, frames):
    return cache


def run(model, counts, solver="mean_flow"):
  noise = jax.random.normal(jax.random.key(0), (1, 2, 5, 1, 1, 2))
  times, _ = sampling.chunk_times([TIMES], 3)
  made = sampling.rollout(
    model,
    PARAMS,
    noise,
    PATTERN,
    times,
    jnp.asarray(counts, jnp.int32),
    solver=solver,
    initial_scale=TIMES[0],
    differentiable=False,
  )
  return noise[0], made


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_jumps_land_on_the_flow_map(counts):
  noise, made = run(Exact(), counts)
  start = jnp.full(noise.shape[:2], TIMES[0])
  want = TEACHER.consistency_function(TIMES[0] * noise, start)
  np.testing.assert_allclose(made.video, want, rtol=1e-4, atol=1e-4)
  last = [TIMES[n - 1] for n in counts]
  np.testing.assert_allclose(made.last_t[0], np.repeat(last, [1, 2, 2]))


def test_euler_steps_with_the_same_velocity_do_not():
  """The test above can tell: the end of a jump matters."""
  _, jumps = run(Exact(), (3, 3, 3))
  _, steps = run(Exact(), (3, 3, 3), solver="euler")
  assert float(jnp.abs(jumps.video - steps.video).max()) > 0.05


@pytest.mark.usefixtures("unchecked")
def test_a_model_that_cannot_jump_is_refused():
  assert isinstance(Exact(), sampling.MeanFlowChunkModel)
  with pytest.raises(ValueError, match=r"`mean_velocity`.*ToyChunks has none"):
    run(ToyChunks((1, 2)), (1, 1, 1))
