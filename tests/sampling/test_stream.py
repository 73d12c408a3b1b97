"""The stream makes the rollout's video, and compiles each call once."""

import functools

import jax
import numpy as np
import pytest
import tiny_wan
from toy_chunks import PARAMS, ToyChunks

from crcm_jax import models, sampling
from crcm_jax.chunks import ChunkPattern

SHAPE = (2, 2, 1)
SCHEDULES = [(0.9, 0.8, 0.6, 0.0), (0.9, 0.5, 0.0), (0.9, 0.0)]


def _noise(steps, frames, seed=0):
  return jax.random.normal(jax.random.key(seed), (steps, 2, frames, *SHAPE))


def _toy_stream(**settings):
  toy = ToyChunks()
  return toy, sampling.Stream(model=lambda _: toy, **settings)


def _video(chunks):
  return np.concatenate(list(map(np.asarray, chunks)), axis=1)


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"initial_scale": 0.9},
    {"solver": "euler"},
    {"context": "last_step"},
    {"context": "last_step", "context_start": 1},
  ],
  ids=lambda s: "-".join(map(str, s.values())) or "default",
)
@pytest.mark.parametrize("given", [0, 4])
def test_the_stream_makes_the_rollouts_video(settings, given):
  pattern, frames = ChunkPattern(1, 3), 10 - given
  prefix = _noise(1, given, 1)[0] if given else None
  xi = _noise(1, 10, 2)[0]
  noise = _noise(3, frames)
  chunks = pattern.num_chunks(10) - {0: 0, 4: 2}[given]
  times, counts = sampling.chunk_times(SCHEDULES, chunks)
  made = sampling.rollout(
    ToyChunks(),
    PARAMS,
    noise,
    pattern,
    times,
    counts,
    prefix=prefix,
    context_noise=xi if "context" in settings else None,
    differentiable=False,
    **settings,
  )
  _, stream = _toy_stream(**settings)
  got = stream(
    PARAMS,
    (),
    noise,
    pattern,
    SCHEDULES,
    prefix=prefix,
    prefix_noise=xi[:, :given],
  )
  np.testing.assert_allclose(_video(got), made.video, atol=2e-6)


def test_nothing_is_compiled_again():
  """One trace a call and size of chunk, for all chunks and all schedules."""
  toy, stream = _toy_stream()
  run = lambda seed, schedules, pattern: _video(
    stream(PARAMS, (), _noise(3, 10, seed), pattern, schedules)
  )
  first = run(0, SCHEDULES, ChunkPattern(1, 3))
  assert toy.calls == 4  # a step and a commit, of 1 frame and of 3
  second = run(1, [(0.7, 0.3, 0.2, 0.0), (0.7, 0.0)], ChunkPattern(1, 3))
  run(0, SCHEDULES, ChunkPattern(1, 1))
  assert toy.calls == 4
  assert np.abs(first - second).max() > 0.1


def test_the_prompt_is_no_constant_of_the_programs():
  """A Wan under two prompts: its rollout's video, and no second trace."""
  traces = []

  class Chunks(models.WanChunks):
    def velocity(self, *args):
      traces.append("velocity")
      return super().velocity(*args)

    def append(self, *args):
      traces.append("append")
      return super().append(*args)

  model = models.Wan(tiny_wan.CONFIG)
  under = functools.partial(Chunks, model, height=4, width=4)
  stream = sampling.Stream(model=under)
  pattern, params = ChunkPattern(1, 1), tiny_wan.params()
  noise = jax.random.normal(jax.random.key(0), (2, 1, 3, 4, 4, 4))
  schedules = [(0.9, 0.4, 0.0), (0.9, 0.0)]
  rollout = tiny_wan.jit(
    lambda text: (
      sampling.rollout(
        models.WanChunks(model, text, height=4, width=4),
        params,
        noise,
        pattern,
        *sampling.chunk_times(schedules, 3),
        differentiable=False,
      ).video
    )
  )
  videos = []
  for seed in (1, 2):
    text = tiny_wan.inputs(3, batch=1, seed=seed)[2]
    videos.append(_video(stream(params, text, noise, pattern, schedules)))
    assert tiny_wan.relative(videos[-1], rollout(text)) < 1e-5
  assert traces == ["velocity", "append"]
  assert np.abs(videos[0] - videos[1]).max() > 1e-3


def test_a_prefix_with_noise_needs_noise():
  _, stream = _toy_stream(context="last_step")
  with pytest.raises(ValueError, match="`prefix_noise` is needed"):
    stream(
      PARAMS,
      (),
      _noise(3, 3),
      ChunkPattern(1, 3),
      SCHEDULES,
      prefix=_noise(1, 1)[0],
    )


def test_schedules_must_fit_the_noise():
  _, stream = _toy_stream()
  with pytest.raises(ValueError, match="`times` must be one longer"):
    stream(PARAMS, (), _noise(2, 4), ChunkPattern(1, 3), SCHEDULES)
