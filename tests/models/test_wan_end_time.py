"""The second time input: where the jump of the velocity ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit, relative

from crcm_jax import ChunkPattern, models, testing

END = dataclasses.replace(CONFIG, end_time=True)
MODEL, PLAIN = models.Wan(END), models.Wan(CONFIG)
PATTERN, FRAMES = ChunkPattern(1, 1), 3
X, T, TEXT, CLEAN = tiny_wan.inputs(FRAMES)


@functools.partial(jit, static_argnames="model")
def forced(params, x, t, context_t, end_time, model=MODEL):
  return model.apply(
    {"params": params},
    x,
    t,
    TEXT,
    pattern=PATTERN,
    context=CLEAN,
    context_t=context_t,
    end_time=end_time,
  )


def test_a_trained_network_computes_what_it_did():
  before = tiny_wan.params()
  config, params = models.add_end_time(before, CONFIG, jax.random.key(0))
  assert config == END
  assert jax.tree.structure(params) == jax.tree.structure(tiny_wan.params(END))
  want = forced(before, X, T, T / 3, None, model=PLAIN)
  for end_time in (T / 2, 0 * T):
    got = forced(params, X, T, T / 3, end_time)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert params["end_embedding"]["up"]["kernel"].any()  # It can learn.


def test_the_end_time_is_read_and_its_default_is_data():
  params = tiny_wan.params(END)
  run = lambda end_time: forced(params, X, T, T / 3, end_time)
  at_zero = run(0 * T)
  assert relative(run(None), at_zero) < 1e-6
  assert relative(run(T / 2), at_zero) > 1e-3


def test_the_end_time_is_its_own_frames():
  """A chunk's end time changes neither earlier chunks nor later ones."""
  params = tiny_wan.params(END)
  changed = (0 * T).at[:, 1].set(0.2)
  one, other = (forced(params, X, T, T / 3, e) for e in (0 * T, changed))
  np.testing.assert_allclose(one[:, [0, 2]], other[:, [0, 2]], atol=1e-5)
  assert relative(one[:, 1], other[:, 1]) > 1e-3


def test_cached_chunks_jump_as_the_whole_video():
  params, end_time = tiny_wan.params(END), T / 2

  class Jumps(models.WanChunks):
    """Gives the checked `velocity` the end time that goes with `t`."""

    velocity = jit(
      lambda self, p, x, t, cache: self.mean_velocity(p, x, t, t / 2, cache),
      static_argnums=0,
    )
    append = jit(models.WanChunks.append, static_argnums=0)

  testing.check_cache_parity(
    lambda x, t: forced(params, x, t, 0 * T, end_time),
    Jumps(MODEL, TEXT, height=4, width=4),
    params,
    X,
    T,
    CLEAN,
    PATTERN,
  )


def test_times_stay_float32_beside_bfloat16_latents():
  model = models.Wan(dataclasses.replace(END, dtype="bfloat16"))
  params = tiny_wan.params(END)
  run = lambda e: jit(model.apply)(
    {"params": params}, X.astype(jnp.bfloat16), T, TEXT, end_time=e
  )
  e = jnp.full_like(T, 0.25)
  assert (run(e) != run(e + 1e-4)).any()  # bfloat16 would round it off


def test_torch_layout_keeps_the_end_embedding():
  params = tiny_wan.params(END)
  state = models.params_to_torch(params, END)
  _, back = models.params_from_torch(state, END)
  jax.tree.map(np.testing.assert_array_equal, back, params)


def test_parameters_are_counted():
  count = sum(a.size for a in jax.tree.leaves(tiny_wan.params(END)))
  assert count == END.parameter_count() > CONFIG.parameter_count()


@pytest.mark.usefixtures("unchecked")
def test_end_time_messages():
  run = lambda model, end: jax.eval_shape(
    lambda p: model.apply({"params": p}, X, T, TEXT, end_time=end),
    tiny_wan.params(model.config),
  )
  with pytest.raises(ValueError, match=r"`end_time` .*add_end_time"):
    run(PLAIN, T)
  with pytest.raises(ValueError, match=r"`end_time` must hold one time per"):
    run(MODEL, T[:, 0])
  with pytest.raises(TypeError, match=r"`end_time` must be float32"):
    run(MODEL, T.astype(jnp.bfloat16))
