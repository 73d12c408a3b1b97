"""Checkpoints of PyTorch projects: in, out, and everything wrong with them."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny_wan
from tiny_wan import CONFIG

from crcm_jax import models
from crcm_jax.models import _torch, _torch_file

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
LAYOUTS = ("wan", "rcm", "diffusers")


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@functools.cache
def state(layout="wan"):
  return models.params_to_torch(tiny_wan.params(), CONFIG, layout=layout)


@functools.cache
def recorded():
  with np.load(GOLDEN / "wan_torch_file.npz") as file:
    return dict(file)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout, tmp_path):
  params, path = tiny_wan.params(), tmp_path / "wan.safetensors"
  assert_equal(models.params_from_torch(state(layout), CONFIG)[1], params)
  about = {"stage": "causal", "pattern": {"first": 1, "rest": 3}}
  models.save_torch(path, params, CONFIG, about, layout=layout)
  assert_equal(models.params_from_torch(path, CONFIG)[1], params)
  assert models.torch_about(path) == about
  assert [p.name for p in tmp_path.iterdir()] == ["wan.safetensors"]
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata()["format"] == "pt"  # transformers asks for it


def test_a_bfloat16_file_is_half_as_long(tmp_path):
  path = tmp_path / "half.safetensors"
  models.save_torch(path, tiny_wan.params(), CONFIG, {}, dtype=jnp.bfloat16)
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_wan.params())
  assert_equal(models.params_from_torch(path, CONFIG)[1], rounded)
  _, wide = models.params_from_torch(path, CONFIG, dtype=jnp.float32)
  assert jax.tree.leaves(wide)[0].dtype == jnp.float32


def test_input_layers_of_every_layout_agree():
  key, conv = "patch_embedding.weight", (16, 4, 1, 2, 2)
  assert state("wan")[key].shape == state("diffusers")[key].shape == conv
  assert state("rcm")[key].shape == (16, 16)
  np.testing.assert_array_equal(
    state("wan")[key].reshape(16, 16), state("rcm")[key]
  )
  assert state()["blocks.1.ffn.0.weight"].shape == (24, 16)


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
  for layout in LAYOUTS:
    params = tiny_wan.params(config)
    arrays = models.params_to_torch(params, config, layout=layout)
    assert models.params_from_torch(arrays)[0] == config


@pytest.mark.parametrize(
  "prefix",
  [
    *("net.", "net_ema.", "model.", "generator.", "generator_ema.model."),
    *("model.diffusion_model.", "module.", "model._fsdp_wrapped_module."),
  ],
)
def test_wrappers_around_keys(prefix):
  wrapped = {prefix + key: value for key, value in state().items()}
  params = models.params_from_torch(wrapped, CONFIG)[1]
  assert_equal(params, tiny_wan.params())


def test_wrappers_inside_keys():
  inside = lambda key: key.replace("blocks.1.", "blocks.1._orig_mod.").replace(
    "blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."
  )
  wrapped = {inside(key): value for key, value in state().items()}
  assert_equal(models.params_from_torch(wrapped, CONFIG)[1], tiny_wan.params())


def test_one_of_several_networks():
  other = {key: 2 * value for key, value in state().items()}
  both = {f"generator.model.{key}": value for key, value in other.items()}
  both |= {f"generator_ema.model.{key}": v for key, v in state().items()}
  params = models.params_from_torch(both, CONFIG, group="generator_ema")[1]
  assert_equal(params, tiny_wan.params())
  params = models.params_from_torch(both, CONFIG, group="generator")[1]
  assert_equal(params, jax.tree.map(lambda a: 2 * a, tiny_wan.params()))
  with pytest.raises(ValueError, match=r"got None, .*'generator.model', 'gen"):
    models.params_from_torch(both, CONFIG)
  with pytest.raises(ValueError, match=r"got 'gen', which fits none"):
    models.params_from_torch(both, CONFIG, group="gen")


def shards(folder):
  """Writes a checkpoint in two shards; returns its index."""
  keys, weight_map = sorted(state()), {}
  for i in (0, 1):
    name, part = f"a-{i + 1}-of-2.safetensors", keys[i::2]
    safetensors.numpy.save_file({k: state()[k] for k in part}, folder / name)
    weight_map |= dict.fromkeys(part, name)
  index = folder / "a.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
  return index


def test_shards(tmp_path):
  index = shards(tmp_path)
  for path in (index, tmp_path):  # a folder is searched
    assert_equal(models.params_from_torch(path, CONFIG)[1], tiny_wan.params())
  (tmp_path / "a-2-of-2.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match=r"also lists \['a-2-of-2.saf"):
    models.params_from_torch(index, CONFIG)
  index.write_text("<html>")
  with pytest.raises(ValueError, match=r"an index with a `weight_map`"):
    models.params_from_torch(index, CONFIG)


def test_a_folder_of_several_checkpoints(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"has no \*.index.json"):
    models.params_from_torch(tmp_path)
  for name in ("a.pt", "b.pt"):
    (tmp_path / name).touch()
  with pytest.raises(ValueError, match=r"\['a.pt', 'b.pt'\]. Name one"):
    models.params_from_torch(tmp_path)


def torch_file(tmp_path, name):
  path = tmp_path / "x.pth"
  path.write_bytes(recorded()[name].tobytes())
  return path


def test_torch_files_are_read_without_torch(tmp_path):
  path = torch_file(tmp_path, "file_new")
  tensors = _torch.open_tensors(path).tensors
  want = {"view", "bfloat16", "half", "count", "empty", "scalar"}
  assert {key.removeprefix("generator.") for key in tensors} == want
  for name in want:
    tensor = tensors[f"generator.{name}"]
    value = tensor.read()
    assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
    np.testing.assert_array_equal(value.astype(np.float32), recorded()[name])
  assert tensors["generator.bfloat16"].dtype == ml_dtypes.bfloat16
  assert tensors["generator.count"].dtype == np.int64


def test_code_in_a_pickle_is_not_run(tmp_path):
  with pytest.raises(ValueError, match=r"calls `pathlib.*refused"):
    models.params_from_torch(torch_file(tmp_path, "file_with_code"))


class Shell:
  """Pickles as a call of the shell."""

  def __init__(self, command):
    self.command = command

  def __reduce__(self):
    return os.system, (self.command,)


def test_a_command_in_a_pickle_is_not_run(tmp_path):
  path, harm = tmp_path / "x.pt", tmp_path / "harm"
  with zipfile.ZipFile(path, "w") as archive:
    command = Shell(f"touch {harm}")
    archive.writestr("x/data.pkl", pickle.dumps({"a": command}))
  with pytest.raises(ValueError, match=r"calls `posix.system`.*refused"):
    models.params_from_torch(path)
  assert not harm.exists()


@pytest.mark.parametrize(
  ("offset", "shape", "stride"),
  [(0, (5,), (1,)), (2, (2, 2), (2, 1)), (-1, (2,), (1,)), (3, (3,), (-1,))],
)
def test_a_tensor_lies_within_its_storage(offset, shape, stride):
  unpickler = _torch_file._Unpickler(io.BytesIO(), pathlib.Path("x"), "x")
  storage = _torch_file._Storage("x/data/0", np.dtype(np.float32), 4)
  unpickler._tensor(storage, 0, (2, 2), (2, 1))
  with pytest.raises(pickle.UnpicklingError, match="exceeds its storage"):
    unpickler._tensor(storage, offset, shape, stride)


def test_broken_torch_files(tmp_path):
  path = torch_file(tmp_path, "file_old")
  with pytest.raises(ValueError, match=r"plain pickle.*before 1.6"):
    models.params_from_torch(path)
  path = torch_file(tmp_path, "file_new")
  whole = path.read_bytes()
  for end in (-1, len(whole) // 2, 100):
    path.write_bytes(whole[:end])
    with pytest.raises(ValueError, match=r"whole file of `torch.save`"):
      models.params_from_torch(path)
  storage = np.arange(24, dtype="<f4").tobytes()
  assert whole.count(storage) == 1
  path.write_bytes(whole.replace(storage, storage[::-1]))
  tensor = _torch.open_tensors(path).tensors["generator.view"]
  with pytest.raises(ValueError, match=r"whole file.*CRC.*Copy it again"):
    tensor.read()


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"\n<!DOCTYPE html><html>Not found</html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
    (bytes(64), "is neither, or not whole"),
    (b"PK\x03\x04 and no more", "whole file of `torch.save`"),
    (b"\x08\0\0\0\0\0\0\0{trunca", "whole safetensors file"),
  ],
)
def test_what_is_no_checkpoint(content, message, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=message):
    models.params_from_torch(path)


def test_a_missing_or_truncated_file(tmp_path):
  path = tmp_path / "model.safetensors"
  with pytest.raises(FileNotFoundError, match=r"`path` .*model.safetensors"):
    models.params_from_torch(path)
  models.save_torch(path, tiny_wan.params(), CONFIG, {})
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"`path` must be a whole .*again"):
    models.params_from_torch(path, CONFIG)


def test_all_wrong_keys_are_named():
  bad = dict(state())
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


def test_what_no_network_reads_is_no_surplus():
  more = {
    "blocks.0.self_attn.attn_op._extra_state": np.zeros(0, np.uint8),
    "rope_position_embedding.seq": np.arange(4.0),
  }
  assert_equal(
    models.params_from_torch(state() | more, CONFIG)[1], tiny_wan.params()
  )


def test_nothing_is_read_before_all_is_checked():
  def read():
    raise AssertionError("read too early")

  tensors = {k: _torch.in_memory(state()).tensors[k] for k in state()}
  tensors = {k: t._replace(read=read) for k, t in tensors.items()}
  tensors.pop("head.modulation")
  found = _torch._recognise(tensors, None)
  with pytest.raises(ValueError, match=r"missing head\.modulation"):
    _torch._check(found, found.network.table(CONFIG, found.layout))


def test_messages():
  with pytest.raises(ValueError, match=r"`config` must be given.* width 16"):
    models.params_from_torch(state())
  with pytest.raises(ValueError, match=r"must hold a Wan.*\['student/head.mo"):
    models.params_from_torch({"student/head.modulation": np.zeros(1)})
  with pytest.raises(ValueError, match=r"`config` must be a WanConfig.*Vae"):
    models.params_from_torch(state(), models.WAN_VAE)
  partly = {k: v for k, v in state().items() if not k.startswith("head")}
  partly["patch_embedding.weight"] = np.zeros((256, 16, 1, 2, 2))
  with pytest.raises(ValueError, match=r"all keys.*missing 'head.head.weight'"):
    models.params_from_torch(partly)
  with pytest.raises(ValueError, match=r"`layout` must be one of.*'other'"):
    models.params_to_torch(tiny_wan.params(), CONFIG, layout="other")


def test_what_a_file_says_must_fit_its_use(tmp_path):
  path = tmp_path / "a.safetensors"
  about = {
    "pattern": {"first": 1, "rest": 3},
    "sampling": {"mid_times": {"2": [[0.625]]}, "context": "clean"},
  }
  models.save_torch(path, tiny_wan.params(), CONFIG, about)
  load = functools.partial(models.params_from_torch, path, CONFIG)
  load(expect={"pattern": {"first": 1, "rest": 3}, "stage": "any"})
  load(expect={"sampling": {"mid_times": {"2": ((0.625,),)}}})
  load(expect=None)
  with pytest.raises(ValueError) as error:
    load(
      expect={
        "pattern": {"first": 3, "rest": 3},
        "sampling": {"mid_times": {"2": [[0.8]]}},
      }
    )
  for part in (
    "pattern.first is 1, expected 3",
    "sampling.mid_times.2 is [[0.625]], expected [[0.8]]",
  ):
    assert part in str(error.value)
  assert "pattern.rest" not in str(error.value)


def test_host_memory_holds_one_parameter(tmp_path, monkeypatch):
  """Beside what went to the device: the largest array and one tensor."""
  config = dataclasses.replace(CONFIG, layers=8, width=32, ffn_width=512)
  params, path = tiny_wan.params(config), tmp_path / "a.safetensors"
  models.save_torch(path, params, config, {})
  sizes = [a.nbytes for a in jax.tree.leaves(params)]
  put = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = lambda shapes: jax.tree.map(lambda _: put, shapes)
  held, rest = [], [0]

  def put_away(array, where):
    """Takes the array for gone: a CPU's device memory is host memory."""
    now, peak = tracemalloc.get_traced_memory()
    held.append(peak - rest[0])
    rest[0] = now - array.nbytes
    tracemalloc.reset_peak()
    return where

  monkeypatch.setattr(jax, "device_put", put_away)
  load = functools.partial(models.params_from_torch, shardings=shardings)
  tracemalloc.start()
  try:
    load(path, config)
  finally:
    tracemalloc.stop()
  del held[0]  # with the table of keys
  assert max(sizes) < max(held) < 1.4 * max(sizes) < 0.7 * sum(sizes)


def test_parameters_go_where_they_shall_live():
  put = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  asked = []

  def shardings(shapes):
    asked.append(shapes)
    return jax.tree.map(lambda _: put, shapes)

  _, params = models.params_from_torch(state(), CONFIG, shardings=shardings)
  assert_equal(params, tiny_wan.params())
  (shapes,) = asked
  for shape, leaf in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(params), strict=True
  ):
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
    assert leaf.sharding == put
