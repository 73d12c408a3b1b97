"""The rollout against its equations written out, on a toy chunk model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_chunks import by_hand, PARAMS, ToyChunks

from crcm_jax.chunks import ChunkPattern
from crcm_jax.sampling import _chunk_times, _rollout
from crcm_jax.sampling._chunk_model import ChunkModel, guided

SHAPE = (2, 2, 1)
SCHEDULES = [(1.0, 0.9, 0.8, 0.6, 0.0), (1.0, 0.5, 0.0)]


def _noise(steps, frames, seed=0):
  return jax.random.normal(jax.random.key(seed), (steps, 2, frames, *SHAPE))


def _by_hand(noise, pattern, times, counts, **settings):
  noise, times, counts, settings = jax.tree.map(
    lambda a: np.asarray(a) if isinstance(a, jax.Array) else a,
    (noise, times, counts, settings),
  )
  given = settings["prefix"].shape[1] if "prefix" in settings else 0
  spans = pattern.spans(noise.shape[2] + given)
  return by_hand(noise, spans, times, counts, **settings)


def _both(noise, pattern, times, counts, **settings):
  run = lambda noise: _rollout.rollout(
    ToyChunks(), PARAMS, noise, pattern, times, counts, **settings
  )
  made = jax.jit(run)(noise)
  return made, _by_hand(noise, pattern, times, counts, **settings)


def _assert_equal(made, expected):
  for name, want in zip(made._fields[:5], expected, strict=True):
    got = getattr(made, name)
    np.testing.assert_allclose(got, want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("differentiable", [True, False])
@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"initial_scale": 0.9},
    {"context": "last_step"},
    {"context": "last_step", "context_start": 1},
  ],
  ids=lambda s: "-".join(s) or "default",
)
@pytest.mark.parametrize(
  ("pattern", "frames"), [((1, 3), 7), ((3, 3), 9), ((2, 1), 2)]
)
def test_rollout_follows_its_equations(
  pattern, frames, settings, differentiable
):
  pattern = ChunkPattern(*pattern)
  chunks = pattern.num_chunks(frames)
  times, full = _chunk_times.chunk_times(SCHEDULES, chunks)
  noise = _noise(4, frames)
  if "context" in settings:
    settings = settings | {"context_noise": _noise(1, frames, 1)[0]}
  run = jax.jit(
    lambda n: _rollout.rollout(
      ToyChunks(),
      PARAMS,
      noise,
      pattern,
      times,
      n,
      differentiable=differentiable,
      **settings,
    )
  )
  for counts in (full, jnp.minimum(full, 1), jnp.minimum(full, 3)):
    expected = _by_hand(noise, pattern, times, counts, **settings)
    _assert_equal(run(counts), expected)


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("given", [1, 4])
def test_a_prefix_is_kept_and_committed(given, start):
  pattern = ChunkPattern(1, 3)
  chunks = (7 - given) // 3
  times, counts = _chunk_times.chunk_times(SCHEDULES, chunks)
  made, expected = _both(
    _noise(4, 7 - given),
    pattern,
    times,
    counts,
    prefix=_noise(1, given, 2)[0],
    context="last_step",
    context_start=start,
    context_noise=_noise(1, 7, 3)[0],
  )
  _assert_equal(made, expected)
  np.testing.assert_array_equal(made.video[:, :given], _noise(1, given, 2)[0])
  np.testing.assert_array_equal(made.last_t[:, :given], 0)


def test_euler_needs_one_noise_and_follows_the_ode():
  pattern = ChunkPattern(1, 2)
  times, counts = _chunk_times.chunk_times([(0.9, 0.6, 0.2, 0.0)], 3)
  made, expected = _both(
    _noise(1, 5), pattern, times, counts, solver="euler", initial_scale=0.9
  )
  _assert_equal(made, expected)


def test_guidance_combines_two_pasts():
  class Shifted(ToyChunks):
    def velocity(self, params, x, t, cache):
      return super().velocity(params, x, t, cache) + 1.0

  assert isinstance(ToyChunks(), ChunkModel)
  plain = ToyChunks()
  assert guided(plain, Shifted(), 1.0) is plain
  model = guided(plain, Shifted(), 3.0)
  assert isinstance(model, ChunkModel)
  x, t = _noise(1, 2)[0], jnp.full((2, 2), 0.5)
  cache = model.init(PARAMS, 2, 4)
  v, cache = model.append(PARAMS, x, t, cache)
  # v_u + 3 (v_c - v_u) with v_u = v_c + 1 is v_c - 2.
  empty = plain.init(PARAMS, 2, 4)
  np.testing.assert_allclose(
    v, plain.velocity(PARAMS, x, t, empty) - 2, atol=1e-5
  )
  np.testing.assert_allclose(
    model.velocity(PARAMS, x, t, model.rewind(PARAMS, cache, jnp.array(0))),
    v,
    atol=1e-5,
  )
  assert int(cache[0].frames) == int(cache[1].frames) == 2


def _loss(video):
  return jnp.sum(jnp.sin(video) ** 2)


@pytest.mark.parametrize("context", ["clean", "last_step"])
def test_gradient_is_that_of_the_last_steps_alone(context):
  pattern, noise = ChunkPattern(1, 2), _noise(4, 5)
  times, full = _chunk_times.chunk_times(SCHEDULES, 3)
  counts = jnp.minimum(full, 3)
  run = functools.partial(
    _rollout.rollout,
    ToyChunks(),
    step_noise=noise,
    pattern=pattern,
    times=times,
    counts=counts,
    context=context,
    context_noise=_noise(1, 5, 1)[0],
  )
  made = jax.jit(run)(PARAMS)
  direct = jax.jit(jax.grad(lambda p: _loss(run(p).video)))(PARAMS)
  again = jax.jit(
    jax.grad(lambda p: _loss(_rollout.replay(ToyChunks(), p, made, pattern)))
  )(PARAMS)
  # By hand: x_0 = x - t (w x + h past + caption + ..).
  d_x_0 = jax.grad(_loss)(made.video) * -made.last_t[..., None, None, None]
  np.testing.assert_allclose(
    direct["w"], jnp.sum(d_x_0 * made.last_input), rtol=1e-4
  )
  np.testing.assert_allclose(direct["caption"], jnp.sum(d_x_0), rtol=1e-4)
  for name in PARAMS:
    np.testing.assert_allclose(direct[name], again[name], rtol=1e-4)
  others = jax.jit(
    jax.grad(
      lambda p: (
        sum(jnp.sum(a) for a in run(p)[1:5])
        + jnp.sum(run(p).cache.x)
        + jnp.sum(run(p, differentiable=False).video)
      )
    )
  )(PARAMS)
  assert all(not np.any(g) for g in jax.tree.leaves(others))


def test_replay_repeats_the_video():
  pattern, noise = ChunkPattern(1, 3), _noise(4, 7)
  times, counts = _chunk_times.chunk_times(SCHEDULES, 3)

  @jax.jit
  def both():
    made = _rollout.rollout(ToyChunks(), PARAMS, noise, pattern, times, counts)
    return made, _rollout.replay(ToyChunks(), PARAMS, made, pattern)

  made, video = both()
  np.testing.assert_allclose(video, made.video, atol=1e-6)


def _equations(jaxpr):
  """Counts equations, those of inner programs included."""
  count = len(jaxpr.eqns)
  for eqn in jaxpr.eqns:
    for value in jax.tree.leaves(eqn.params):
      value = getattr(value, "jaxpr", value)
      count += _equations(value) if hasattr(value, "eqns") else 0
  return count


@pytest.mark.parametrize("pattern", [(1, 3), (3, 3)])
def test_program_does_not_grow_with_chunks_or_steps(pattern):
  pattern = ChunkPattern(*pattern)

  def size(chunks, schedule):
    frames = pattern.first + (chunks - 1) * pattern.rest
    times, counts = _chunk_times.chunk_times([schedule], chunks)
    noise = _noise(len(schedule) - 1, frames)
    jaxpr = jax.make_jaxpr(
      lambda c: _rollout.rollout(
        ToyChunks(), PARAMS, noise, pattern, times, c, differentiable=False
      )
    )(counts)
    return _equations(jaxpr.jaxpr)

  assert size(3, SCHEDULES[0]) == size(6, SCHEDULES[0])
  assert size(3, SCHEDULES[0]) == size(3, SCHEDULES[1])


def test_one_trace_serves_the_whole_cycle_of_counts():
  times, full = _chunk_times.chunk_times(SCHEDULES, 3)
  model = ToyChunks()

  @jax.jit
  def run(counts):
    return _rollout.rollout(
      model, PARAMS, _noise(4, 7), ChunkPattern(1, 3), times, counts
    ).video

  calls = []
  for steps in range(1, 5):
    run(jnp.minimum(full, steps))
    calls.append(model.calls)
  assert len(set(calls)) == 1
  assert run._cache_size() == 1


@pytest.mark.parametrize(
  ("schedule", "message"),
  [
    ([], "`schedules` must hold at least one"),
    ([(1.0, 0.5, 0.7, 0.0)], "`schedules` must decrease from a first time"),
    ([(1.0, 0.5)], "must decrease from a first time"),
    ([(0.0,)], "must decrease from a first time"),
    ([(1.5, 0.5, 0.0)], "at most 1"),
    ([(1.0, 0.0), (1.0, 0.5, 0.0)], r"longer .* got \[1, 2\]"),
  ],
)
def test_schedules_that_make_no_sense_are_refused(schedule, message):
  with pytest.raises(ValueError, match=message):
    _chunk_times.chunk_times(schedule, 2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"frames": 6}, "frames"),
    ({"steps": 3}, "`times` must be one longer than the steps.*4; got 5"),
    ({"chunks": 2}, r"`times` must hold one schedule.*\(3, steps \+ 1\)"),
    ({"counts": jnp.ones(2, int)}, r"`counts` must hold one number.*\(3,\)"),
    ({"counts": jnp.array([5, 1, 1])}, r"`counts` .* \[4, 2, 2\]; got \[5, 1,"),
    ({"counts": jnp.array([4, 3, 1])}, r"`counts` .* \[4, 2, 2\]; got \[4, 3,"),
    ({"counts": jnp.array([4, 0, 1])}, r"`counts` .* \[4, 2, 2\]; got \[4, 0,"),
    ({"times": [1.0, 0.5, 0.8, 0.1, 0.0]}, "`times` must decrease"),
    ({"context_noise": jnp.zeros((2, 6, *SHAPE))}, "all 7 frames.*got 6"),
    ({"context_times": jnp.ones(2)}, r"`context_times` .*\(3,\).*got \(2,\)"),
    ({"solver": "heun"}, "`solver` must be"),
    ({"context": "dirty"}, "`context` must be"),
    ({"given": 2}, "`prefix` must be whole chunks.*got 2"),
    ({"given": 7}, "`prefix` must be whole chunks.*got 7"),
    (
      {"given": 1, "chunks": 2, "context": "last_step", "frames": 6},
      "`context_noise` is needed",
    ),
  ],
  ids=lambda c: ",".join(c) if isinstance(c, dict) else "",
)
@pytest.mark.usefixtures("unchecked")
def test_errors_say_what_was_expected(change, message):
  change = dict(change)
  frames, steps = change.pop("frames", 7), change.pop("steps", 4)
  given = change.pop("given", 0)
  times, counts = _chunk_times.chunk_times(SCHEDULES, change.pop("chunks", 3))
  if "times" in change:
    times = jnp.tile(jnp.array(change.pop("times")), (3, 1))
  if given:
    change["prefix"] = jnp.zeros((2, given, *SHAPE))
  with pytest.raises(ValueError, match=message):
    _rollout.rollout(
      ToyChunks(),
      PARAMS,
      _noise(steps, frames - given if given > 1 else frames),
      ChunkPattern(1, 3),
      times,
      change.pop("counts", counts),
      **change,
    )
