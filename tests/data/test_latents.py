import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import data
from crcm_jax.data import _latents


def real_video(clips=300):
  video = np.stack([data.make_clip(i).video for i in range(clips)])
  return video.astype(np.float32) / 127.5 - 1


def test_roundtrip_is_exact():
  video = real_video(20)
  latents = data.latents_from_video(video)
  assert latents.shape == (20, 21, 8, 8, 16)
  assert latents.dtype == np.float32
  back = data.video_from_latents(latents)
  np.testing.assert_allclose(back, video, rtol=0, atol=1e-6)
  doubles = np.random.default_rng(0).uniform(-1, 1, (3, 32, 32, 3))
  back = data.video_from_latents(data.latents_from_video(doubles))
  np.testing.assert_allclose(back, doubles, rtol=0, atol=1e-13)


def test_jax_and_numpy_agree_and_keep_their_kind():
  video = real_video(2)
  latents = jax.jit(data.latents_from_video)(jnp.asarray(video))
  assert isinstance(latents, jax.Array)
  np.testing.assert_allclose(
    latents, data.latents_from_video(video), rtol=0, atol=2e-5
  )
  back = data.video_from_latents(latents)
  np.testing.assert_allclose(back, video, rtol=0, atol=1e-6)


def test_the_transform_is_orthonormal():
  d = _latents._dct()
  np.testing.assert_allclose(d @ d.T, np.eye(16), atol=1e-15)


def test_constants_are_those_of_the_data():
  latents = data.latents_from_video(real_video())
  assert abs(latents.mean()) < 0.02
  assert abs(latents.std() - 1) < 0.03
  std = latents.std(axis=(0, 1, 2, 3)) * _latents.SCALE
  std = std.reshape(4, 4)
  std = (std + std.T) / 2
  np.testing.assert_allclose(std.ravel(), _latents._STD, rtol=0.05)


def test_channels_are_colour_then_frequency():
  video = np.full((1, 32, 32, 2), -1.0)
  video[..., 1] = np.cos(np.pi * (np.arange(32) % 4 + 0.5) / 4)  # along w
  plain = data.latents_from_video(np.full_like(video, -1.0))
  moved = data.latents_from_video(video) - plain
  assert set(np.flatnonzero(np.abs(moved).max((0, 1, 2)) > 1e-9)) == {16, 17}


def test_bad_shapes_say_what_is_wrong():
  with pytest.raises(ValueError, match=r"`video` must have .* got 30 x 32"):
    data.latents_from_video(np.zeros((1, 30, 32, 1)))
  with pytest.raises(ValueError, match=r"`latents` must have .* got 12"):
    data.video_from_latents(np.zeros((1, 8, 8, 12)))
