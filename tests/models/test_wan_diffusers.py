"""The transformer against diffusers', text-to-video and image-to-video."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_wan
import wan_weights
from quick_jit import quick_jit

from crcm_jax import ChunkPattern, models
from crcm_jax.models import _torch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
TEXT_TO_VIDEO = models.WanConfig(
  layers=2,
  width=32,
  heads=2,
  ffn_width=48,
  text_width=6,
  text_length=512,
  freq_width=16,
  in_channels=4,
  out_channels=4,
)
IMAGE_TO_VIDEO = dataclasses.replace(
  TEXT_TO_VIDEO, in_channels=10, image_width=12
)
FULL = {
  "1.3B": models.WAN_1_3B,
  "14B": models.WAN_14B,
  "14B_image": models.WAN_14B_IMAGE,
}


@functools.cache
def recorded():
  with np.load(GOLDEN / "wan_transformer.npz") as file:
    return dict(file)


@functools.cache
def params(config):
  table = _torch.WAN.table(config, "diffusers")
  state = wan_weights.state_dict({k: e.shape for k, e in table.items()})
  return models.params_from_torch(state, config)[1]


def inputs():
  x = jnp.asarray(wan_weights.normal("x", (2, 3, 4, 6, 4)))
  t = jnp.repeat(jnp.array([[0.75], [0.02]]), 3, axis=1)
  text = jnp.asarray(wan_weights.normal("text", (2, 512, 6)))
  return x, t, text


def conditioning():
  return models.Conditioning(
    text=inputs()[2],
    image=jnp.asarray(wan_weights.normal("image", (2, 5, 12))),
    frames=jnp.asarray(wan_weights.normal("frames", (2, 3, 4, 6, 6))),
  )


def apply(config, text, **options):
  x, t, _ = inputs()
  model = models.Wan(config)
  run = functools.partial(model.apply, **options)
  return quick_jit(run)({"params": params(config)}, x, t, text)


@functools.cache
def image_to_video():
  return apply(IMAGE_TO_VIDEO, conditioning())


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_text_to_video_equals_diffusers():
  close(apply(TEXT_TO_VIDEO, inputs()[2]), recorded()["text"])


def test_image_to_video_equals_diffusers():
  close(image_to_video(), recorded()["image"])


def test_image_to_video_chunk_by_chunk():
  """A cache and the frames' slices give what a causal pass gives."""
  x, t, _ = inputs()
  model, pattern = models.Wan(IMAGE_TO_VIDEO), ChunkPattern(1, 2)
  want = apply(
    IMAGE_TO_VIDEO, conditioning(), pattern=pattern, context=inputs()[0]
  )
  assert tiny_wan.relative(want, image_to_video()) > 1e-3
  chunks = models.WanChunks(model, conditioning(), height=4, width=6)
  p = params(IMAGE_TO_VIDEO)

  @quick_jit
  def rollout(p):
    cache = chunks.init(p, 2, 3)
    first = chunks.velocity(p, x[:, :1], t[:, :1], cache)
    _, cache = chunks.append(p, x[:, :1], 0 * t[:, :1], cache)
    return first, chunks.velocity(p, x[:, 1:], t[:, 1:], cache)

  got = jnp.concatenate(rollout(p), axis=1)
  assert tiny_wan.relative(got, want) < 1e-5


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("name", sorted(FULL))
def test_names_and_shapes_at_full_size(layout, name):
  config = FULL[name]
  table = _torch.WAN.table(config, layout)
  rename = json.loads(str(recorded()[f"renamed_{name}"]))
  rename = rename.get if layout == "wan" else lambda key: key
  got = {rename(key): list(entry.shape) for key, entry in table.items()}
  assert got == json.loads(str(recorded()[f"shapes_{name}"]))
  other = _torch.WAN.table(config, "diffusers")
  for key, entry in table.items():
    twin = other[rename(key)]
    assert (twin.path, twin.layer) == (entry.path, entry.layer)


@pytest.mark.parametrize("name", sorted(FULL))
def test_parameters_are_those_of_the_network(name):
  config = FULL[name]
  x = jnp.zeros((1, 1, 2, 2, config.out_channels))
  text = jnp.zeros((1, 512, 4096))
  if config.image_width is not None:
    frames, image = jnp.zeros((1, 1, 2, 2, 20)), jnp.zeros((1, 257, 1280))
    text = models.Conditioning(text, image, frames)
  init = functools.partial(models.Wan(config).init, jax.random.key(0))
  shapes = jax.eval_shape(init, x, jnp.zeros((1, 1)), text)["params"]
  flat = {path: a.shape for path, a in _torch.flatten(shapes).items()}
  assert sum(map(np.prod, flat.values())) == config.parameter_count()
  shapes = json.loads(str(recorded()[f"shapes_{name}"]))
  assert sum(map(np.prod, shapes.values())) == config.parameter_count()


def test_config_read_off_the_arrays():
  wide = dataclasses.replace(
    IMAGE_TO_VIDEO, width=128, heads=1, text_length=512
  )
  for layout in ("wan", "rcm", "diffusers"):
    table = _torch.WAN.table(wide, layout)
    state = {k: np.zeros(e.shape, np.float32) for k, e in table.items()}
    if layout == "diffusers":  # some files hold what no network reads
      state["blocks.0.attn2.norm_added_q.weight"] = np.zeros(128)
    assert models.params_from_torch(state)[0] == wide


def test_presets_are_what_the_originals_say():
  original = dict(
    dim=5120, ffn_dim=13824, freq_dim=256, num_heads=40, num_layers=40,
    in_dim=36, out_dim=16, text_len=512, text_dim=4096, model_type="i2v",
  )  # fmt: skip
  config = models.WanConfig.from_wan(original, dtype=jnp.bfloat16)
  assert config == models.WAN_14B_IMAGE


def test_mask_and_latents_of_an_image():
  latents = jnp.asarray(wan_weights.normal("latents", (1, 3, 2, 2, 16)))
  frames = models.image_frames(latents)
  assert frames.shape == (1, 3, 2, 2, 20)
  np.testing.assert_array_equal(frames[..., 4:], latents)
  np.testing.assert_array_equal(frames[:, 0, ..., :4], 1)
  np.testing.assert_array_equal(frames[:, 1:, ..., :4], 0)


def test_messages(unchecked):
  x, t, text = inputs()
  apply = models.Wan(IMAGE_TO_VIDEO).apply
  with pytest.raises(ValueError, match=r"c = 10; got.*`Conditioning.frames`"):
    apply({"params": {}}, x, t, text)
  incomplete = conditioning()._replace(image=None)
  with pytest.raises(ValueError, match=r"`text.image` must hold CLIP.*None"):
    apply({"params": {}}, x, t, incomplete)
  few = conditioning()._replace(frames=conditioning().frames[:, :2])
  with pytest.raises(
    ValueError, match=r"`text.frames` .*3, 4, 6\); got \(2, 2"
  ):
    apply({"params": {}}, x, t, few)
  apply = models.Wan(TEXT_TO_VIDEO).apply
  surplus = conditioning()._replace(frames=None)
  with pytest.raises(ValueError, match=r"`text.image` must be None"):
    apply({"params": {}}, x, t, surplus)
