"""Frames that come as they are made are those of the whole video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_generation
from tiny_generation import generator, networks, text

from crcm_jax import generation, models, sampling
from crcm_jax.chunks import ChunkPattern


@pytest.fixture(autouse=True)
def _compile_fast():
  with tiny.compile_fast():
    yield


def _join(chunks):
  return np.concatenate(list(map(np.asarray, chunks)), axis=1)


def _rollout(made, prompts, noise, solver="consistency"):
  """The rollout of the same noise, in one piece."""
  under = [
    models.WanChunks(networks().transformer, prompt, height=4, width=6)
    for prompt in prompts
  ]
  settings = made.settings
  chunks = settings.pattern.num_chunks(noise.shape[2])
  return sampling.rollout(
    sampling.guided(under[0], under[-1], settings.guidance),
    networks().params,
    noise,
    settings.pattern,
    *sampling.chunk_times(settings.schedules, chunks),
    solver=solver,
    initial_scale=settings.schedules[0][0],
    differentiable=False,
  ).video


def _noise(steps, seed=0):
  key, _ = jax.random.split(jax.random.key(seed))
  return jax.random.normal(key, (steps, 1, 3, 4, 6, 16))


def test_the_first_frame_waits_for_no_other_chunk():
  made = generator()
  begun = []

  def chunks():
    for i, chunk in enumerate(made.latents(text())):
      begun.append(i)
      yield chunk

  pieces = made.decode(chunks())
  next(pieces)
  assert begun == [0]
  next(pieces)  # later ones keep the device busy
  assert begun == [0, 1, 2]


def test_frames_are_those_of_the_decoded_rollout():
  made = generator()
  pieces = list(made(text()))
  assert [piece.shape for piece in pieces] == [
    (1, 32, 48, 3),
    *[(4, 32, 48, 3)] * 2,
  ]
  latents = _join(made.latents(text()))
  np.testing.assert_allclose(
    latents, _rollout(made, [jnp.asarray(text())], _noise(2)), atol=1e-4
  )
  pixels, _ = models.decode_chunk(
    networks().vae, networks().vae_params, jnp.asarray(latents)
  )
  want = (np.asarray(pixels[0]) + 1) * 127.5
  frames = np.concatenate(pieces)
  assert np.abs(frames - want).max() < 0.51
  assert frames.std() > 1
  np.testing.assert_array_equal(frames, tiny_generation.clip())


def test_prompt_and_seed_matter():
  made = generator()
  first = _join(made.latents(text()))
  assert np.abs(first - _join(made.latents(text("a dog")))).max() > 1e-6
  assert np.abs(first - _join(made.latents(text(), seed=1))).max() > 0.1


def test_a_causal_teacher_is_guided_along_its_ode():
  made = generator(pattern=ChunkPattern(1, 1), solver="euler", steps=(2,))
  prompts = [jnp.asarray(text()), jnp.asarray(text(""))]
  latents = _join(made.latents(*prompts))
  want = _rollout(made, prompts, _noise(1), solver="euler")
  np.testing.assert_allclose(latents, want, atol=1e-4)
  with pytest.raises(ValueError, match="`null` must hold embeddings"):
    made.latents(text())


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_a_bidirectional_network_makes_the_whole_clip(solver):
  made = generator(solver=solver, steps=(3,))
  prompts = [jnp.asarray(text()), jnp.asarray(text(""))]
  (latents,) = made.latents(*prompts)
  scale = made.settings.guidance

  def velocity(x, t):
    t = jnp.repeat(t[:, None], 3, axis=1)
    v, v_null = (
      networks().transformer.apply({"params": networks().params}, x, t, prompt)
      for prompt in prompts
    )
    return v_null + scale * (v - v_null)

  times = np.asarray(made.settings.schedules[0])
  start = times[0] * _noise(1)[0]
  want = sampling.integrate(velocity, start, times, solver=solver)
  np.testing.assert_allclose(latents, want, atol=1e-4)


def test_an_image_is_the_first_frame():
  made = generator()
  image = np.linspace(-1, 1, 32 * 48 * 3, dtype=np.float32).reshape(32, 48, 3)
  first, *rest = made.latents(text(), image=image)
  vae, params = networks().vae, networks().vae_params
  want = models.encode_video(vae, params, jnp.asarray(image)[None, None])
  np.testing.assert_allclose(first, want, atol=1e-5)
  assert [chunk.shape[1] for chunk in rest] == [1, 1]
  other = list(made.latents(text(), image=-image))
  assert np.abs(_join(rest) - _join(other[1:])).max() > 1e-6
  with pytest.raises(ValueError, match="shape of a frame, \\(32, 48, 3\\)"):
    made.latents(text(), image=image[:16])
  for settings in (dict(), dict(pattern=ChunkPattern(3, 3))):
    with pytest.raises(ValueError, match="`image` must be all of the first"):
      generator(solver="euler", **settings).latents(text(), text(), image=image)


def test_settings_share_what_was_compiled():
  """A second generator of the same settings compiles nothing."""
  list(generator()(text()))
  sizes = lambda: (
    sampling.Stream.step._cache_size(),
    generation.decode_to_bytes._cache_size(),
  )
  before = sizes()
  list(generator()(text("another"), seed=3))
  list(generator(pattern=ChunkPattern(1, 1), mid_times=((0.7,), ()))(text()))
  assert sizes() == before


def test_a_network_that_needs_an_image_is_refused():
  config = models.WanConfig(
    layers=1, width=8, heads=1, ffn_width=8, text_width=4, text_length=2,
    image_width=6, in_channels=36,
  )  # fmt: skip
  wrong = generation.Networks(
    transformer=models.Wan(config),
    params={},
    vae=networks().vae,
    vae_params={},
    embed=networks().embed,
    about={},
    weights_hash="",
  )
  with pytest.raises(ValueError, match="`networks` must be text-to-video"):
    generation.Generator(wrong, generator().settings)
