"""The autoencoder against diffusers', and its pieces against its whole."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wan_weights
from quick_jit import quick_jit

from crcm_jax import models
from crcm_jax.models import _torch, _vae_video

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
CONFIG = dataclasses.replace(models.WAN_VAE, width=4)
VAE = models.Vae(CONFIG)
SMALL = models.Vae(
  dataclasses.replace(CONFIG, multipliers=(1, 2), time=(True,), blocks=1)
)


@functools.cache
def recorded():
  with np.load(GOLDEN / "wan_vae.npz") as file:
    return dict(file)


@functools.cache
def params(vae=VAE, layout="diffusers"):
  table = _torch.VAE.table(vae.config, layout)
  state = wan_weights.state_dict({k: e.shape for k, e in table.items()})
  return models.params_from_torch(state, vae.config)[1]


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_encode_equals_diffusers():
  video = wan_weights.uniform("video", (1, 9, 16, 24, 3))
  latents = quick_jit(functools.partial(models.encode_video, VAE))(
    params(), video
  )
  latents = np.asarray(latents) * recorded()["std"] + recorded()["mean"]
  close(latents, recorded()["latents"])


def test_decode_equals_diffusers():
  z = wan_weights.normal("latents", (1, 3, 2, 3, 16))
  latents = np.float32((z - recorded()["mean"]) / recorded()["std"])
  video = quick_jit(functools.partial(models.decode_video, VAE))(
    params(), latents
  )
  assert np.std(video) > 0.1
  close(video, recorded()["decoded"])


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_names_and_shapes_at_full_size(layout):
  table = _torch.VAE.table(models.WAN_VAE, layout)
  rename = json.loads(str(recorded()["renamed"]))
  name = lambda key: rename[key] if layout == "wan" else key
  got = {name(key): list(entry.shape) for key, entry in table.items()}
  assert got == json.loads(str(recorded()["shapes"]))
  # The same array goes to the same place from both.
  other = _torch.VAE.table(models.WAN_VAE, "diffusers")
  assert all(other[name(key)].path == e.path for key, e in table.items())


def test_parameters_are_those_of_the_network():
  def init():
    return models.Vae(models.WAN_VAE).init(
      jax.random.key(0), jnp.zeros((1, 5, 8, 8, 3))
    )["params"]

  flat = _torch.flatten(jax.eval_shape(init))
  table = _torch.VAE.table(models.WAN_VAE, "wan")
  ours = {
    e.path: e.to_ours(np.broadcast_to(np.int8(0), e.shape)).shape
    for e in table.values()
  }
  assert ours == {path: a.shape for path, a in flat.items()}


@functools.cache
def clip(frames):
  return jnp.asarray(wan_weights.normal("clip", (1, frames, 4, 6, 16)))


@functools.cache
def decoder():
  return quick_jit(
    functools.partial(_vae_video.decode_chunk.__wrapped__, SMALL)
  )


@functools.cache
def whole():
  """A clip in one call: no scan, no cache."""
  apply = functools.partial(SMALL.apply, method="decode")
  return np.asarray(quick_jit(apply)({"params": params(SMALL)}, clip(6)))


@pytest.mark.parametrize("sizes", [(1, 3, 2), (2, 4)])
def test_decoding_by_chunks_equals_the_whole(sizes):
  pieces, cache = [], None
  for latents in jnp.split(clip(6), np.cumsum(sizes)[:-1], axis=1):
    video, cache = decoder()(params(SMALL), latents, cache)
    pieces.append(video)
  np.testing.assert_allclose(
    np.concatenate(pieces, 1), whole(), rtol=0, atol=2e-6
  )


def test_scan_equals_one_latent_at_a_time():
  """The same numbers, bit for bit: nothing depends on the clip's length."""
  scanned = quick_jit(functools.partial(models.decode_video, SMALL))(
    params(SMALL), clip(6)
  )
  pieces, cache = [], None
  for i in range(6):
    video, cache = decoder()(params(SMALL), clip(6)[:, i : i + 1], cache)
    pieces.append(video)
  np.testing.assert_array_equal(np.concatenate(pieces, 1), scanned)


def test_encoding_by_chunks_equals_the_whole():
  video = jnp.asarray(wan_weights.uniform("video", (1, 9, 8, 12, 3)))
  apply = functools.partial(SMALL.apply, method="encode")
  want = quick_jit(apply)({"params": params(SMALL)}, video)
  step = quick_jit(
    functools.partial(_vae_video.encode_chunk.__wrapped__, SMALL)
  )
  first, cache = step(params(SMALL), video[:, :3], None)
  later, cache = step(params(SMALL), video[:, 3:], cache)
  got = np.concatenate([first, later], 1)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)
  scanned = quick_jit(functools.partial(models.encode_video, SMALL))(
    params(SMALL), video
  )
  np.testing.assert_allclose(scanned, want, rtol=0, atol=2e-6)


def test_memory_does_not_grow_with_the_clip():
  """A latent frame more costs a few copies of its pixels, no features."""

  def temporaries(frames):
    latents = jax.ShapeDtypeStruct((1, frames, 4, 6, 16), jnp.float32)
    decode = quick_jit(functools.partial(models.decode_video, SMALL))
    compiled = decode.lower(params(SMALL), latents).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  growth = (temporaries(20) - temporaries(3)) / 17
  pixels = 2 * (8 * 12 * 3) * 4
  features = 2 * (8 * 12 * CONFIG.width) * 4  # of one layer at full size
  assert growth <= 3 * pixels < 3 * features


def test_tiles_are_blended_by_their_distance_to_the_edge():
  decode = functools.partial(models.decode_video, SMALL)
  tiled = functools.partial(decode, tile=(4, 4), overlap=2)
  got = quick_jit(tiled)(params(SMALL), clip(2))
  parts = [
    quick_jit(decode)(params(SMALL), clip(2)[..., s : s + 4, :]) for s in (0, 2)
  ]
  left, right = (np.asarray(part) for part in parts)
  rise = ((np.arange(4) + 0.5) / 4)[:, None]
  middle = left[:, :, :, 4:] * rise[::-1] + right[:, :, :, :4] * rise
  want = np.concatenate([left[:, :, :, :4], middle, right[:, :, :, 4:]], 3)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_tiles_that_hold_the_frame_change_nothing():
  decode = functools.partial(models.decode_video, SMALL)
  want = quick_jit(decode)(params(SMALL), clip(2))
  got = quick_jit(functools.partial(decode, tile=(4, 8)))(
    params(SMALL), clip(2)
  )
  np.testing.assert_array_equal(got, want)


def test_encoding_in_tiles():
  video = jnp.asarray(wan_weights.uniform("video", (1, 3, 8, 12, 3)))
  encode = functools.partial(models.encode_video, SMALL)
  got = quick_jit(functools.partial(encode, tile=(4, 4), overlap=2))(
    params(SMALL), video
  )
  left, right = (
    quick_jit(encode)(params(SMALL), video[:, :, :, s : s + 8]) for s in (0, 4)
  )
  assert got.shape == (1, 2, 4, 6, 16)
  np.testing.assert_allclose(got[:, :, :, :2], left[:, :, :, :2], atol=1e-5)
  np.testing.assert_allclose(got[:, :, :, 4:], right[:, :, :, 2:], atol=1e-5)
  middle = 0.75 * left[:, :, :, 2] + 0.25 * right[:, :, :, 0]
  np.testing.assert_allclose(got[:, :, :, 2], middle, atol=1e-5)


def test_bfloat16():
  half = models.Vae(dataclasses.replace(SMALL.config, dtype=jnp.bfloat16))
  cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params(SMALL))
  got = quick_jit(functools.partial(models.decode_video, half))(cast, clip(6))
  assert got.dtype == jnp.bfloat16
  error = np.linalg.norm(np.float32(got) - whole()) / np.linalg.norm(whole())
  assert 1e-4 < error < 0.05
  encode = functools.partial(models.encode_video, half)
  assert jax.eval_shape(encode, cast, got).dtype == jnp.float32


def test_messages():
  p, video = params(SMALL), jnp.zeros((1, 4, 8, 8, 3))
  with pytest.raises(ValueError, match=r"`video` must have 2k \+ 1 .* to 3"):
    models.encode_video(SMALL, p, video)
  with pytest.raises(ValueError, match=r"divisible by 2; got 7 x 8.*6 x 8"):
    models.encode_video(SMALL, p, video[:, :3, :7])
  with pytest.raises(ValueError, match=r"divisible by 2; got 0 x 8"):
    models.encode_video(SMALL, p, video[:, :3, :0])
  with pytest.raises(ValueError, match=r"`latents` must be.* c = 16; got"):
    models.decode_video(SMALL, p, jnp.zeros((1, 2, 4, 4, 8)))
  with pytest.raises(ValueError, match=r"`overlap` must be .* less than"):
    models.decode_video(SMALL, p, clip(2), tile=(2, 2), overlap=2)
  with pytest.raises(ValueError, match=r"`time` must say"):
    dataclasses.replace(CONFIG, time=(True,))
  with pytest.raises(ValueError, match=r"`std` must have one entry"):
    dataclasses.replace(CONFIG, std=(1.0,))


def test_config_is_read_off_the_arrays():
  for layout in ("wan", "diffusers"):
    state = models.params_to_torch(params(), CONFIG, layout=layout)
    config, back = models.params_from_torch(state)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, back, params())
