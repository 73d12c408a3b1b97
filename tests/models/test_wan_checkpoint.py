"""Parameters to files and to torch's layout, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_wan

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


def test_what_a_file_says_must_fit_its_use(tmp_path):
  path, pattern = tmp_path / "d.safetensors", {"first": 1, "rest": 3}
  models.save_params(path, {"a": jnp.ones(2)}, {"pattern": pattern})
  models.load_params(path, expect={"pattern": pattern, "stage": "any"})
  with pytest.raises(ValueError, match=r"pattern.first is 1, expected 3"):
    models.load_params(path, expect={"pattern": {"first": 3}})
