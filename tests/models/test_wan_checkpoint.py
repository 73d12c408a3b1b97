"""Parameters to files and to torch's layout, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_wan
from tiny_wan import CONFIG

from crcm_jax import models


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_save_and_load(tmp_path):
  params = tiny_wan.params()
  models.save_params(tmp_path / "a.safetensors", params, {"lr": 0.1, "a": [1]})
  loaded, metadata = models.load_params(tmp_path / "a.safetensors")
  assert_equal(loaded, params)
  assert metadata == {"lr": 0.1, "a": [1]}
  assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_bfloat16_file(tmp_path):
  params, path = tiny_wan.params(), tmp_path / "b.safetensors"
  models.save_params(path, params, {}, dtype=jnp.bfloat16)
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  assert_equal(models.load_params(path)[0], rounded)
  wide = jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
  assert_equal(models.load_params(path, dtype=jnp.float32)[0], wide)


def test_load_messages(tmp_path):
  path = tmp_path / "c.safetensors"
  with pytest.raises(FileNotFoundError, match=r"`path` .*c.safetensors"):
    models.load_params(path)
  models.save_params(path, tiny_wan.params(), {})
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"`path` must be a whole .*again"):
    models.load_params(path)
  safetensors.numpy.save_file({"a": np.zeros(2)}, path)
  with pytest.raises(ValueError, match=r"`save_params`.*`params_from_torch`"):
    models.load_params(path)


def test_torch_round_trip(tmp_path):
  params, path = tiny_wan.params(), tmp_path / "wan.safetensors"
  state = models.params_to_torch(params, CONFIG)
  assert state["blocks.1.ffn.0.weight"].shape == (24, 16)
  _, back = models.params_from_torch(state, CONFIG)
  assert_equal(back, params)
  safetensors.numpy.save_file(state, path)
  assert_equal(models.params_from_torch(path, CONFIG)[1], params)
  conv = state["patch_embedding.weight"].reshape(16, 4, 1, 2, 2)
  state = state | {"patch_embedding.weight": conv}
  assert_equal(models.params_from_torch(state, CONFIG)[1], params)


def test_config_read_off_the_arrays():
  config = models.WanConfig(
    layers=1,
    width=256,
    heads=2,
    ffn_width=8,
    freq_width=4,
    text_width=6,
    text_length=512,
    in_channels=4,
    out_channels=4,
  )
  state = models.params_to_torch(tiny_wan.params(config), config)
  assert models.params_from_torch(state)[0] == config


def test_torch_messages():
  state = models.params_to_torch(tiny_wan.params(), CONFIG)
  bad = dict(state)
  del bad["head.modulation"]
  bad["extra"] = np.zeros(1)
  bad["blocks.0.norm3.bias"] = np.zeros(5)
  with pytest.raises(ValueError) as error:
    models.params_from_torch(bad, CONFIG)
  for part in (
    "missing head.modulation",
    "surplus extra",
    r"blocks.0.norm3.bias has shape (5,), expected (16,)",
  ):
    assert part in str(error.value)
  with pytest.raises(ValueError, match=r"`config` must be given.* width 16"):
    models.params_from_torch(state)
  with pytest.raises(ValueError, match=r"missing.*Strip any prefix"):
    models.params_from_torch({"student/head.modulation": np.zeros(1)})
  with pytest.raises(ValueError, match=r'`layout` must be "wan"'):
    models.params_to_torch(tiny_wan.params(), CONFIG, layout="other")
