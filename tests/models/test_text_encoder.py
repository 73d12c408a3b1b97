"""The text encoder against transformers', and embeddings kept on disk."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import wan_weights
from quick_jit import quick_jit

from crcm_jax import models
from crcm_jax.models import _prompts, _text_encoder, _torch

ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = models.TextConfig(
  layers=2, width=16, heads=3, head_width=8, ffn_width=24, vocabulary=40
)
MODEL = models.TextEncoder(CONFIG)


@functools.cache
def recorded():
  with np.load(ROOT / "tests" / "golden" / "wan_text.npz") as file:
    return dict(file)


@functools.cache
def state():
  table = _torch.TEXT.table(CONFIG, "diffusers")
  return wan_weights.state_dict({k: e.shape for k, e in table.items()})


@functools.cache
def params():
  return models.params_from_torch(state(), CONFIG)[1]


def test_equals_transformers():
  tokens, mask = jnp.int32(recorded()["tokens"]), recorded()["mask"]
  got = quick_jit(MODEL.apply)({"params": params()}, tokens, mask)
  got, want = got[mask], recorded()["embeddings"][mask]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
  assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def test_buckets_equal_transformers():
  """Exactly, at every distance: a boundary is a matter of rounding."""
  rows = _text_encoder.buckets(512, 32, 128)
  far = np.arange(-511, 512)
  i = np.where(far < 0, -far, 0)
  np.testing.assert_array_equal(rows[i, i + far], recorded()["buckets"])
  assert rows.min() == 0
  assert rows.max() == 31


def test_names_and_shapes_at_full_size():
  want = json.loads(str(recorded()["shapes"]))
  assert want.pop("encoder.embed_tokens.weight") == want["shared.weight"]
  table = _torch.TEXT.table(models.UMT5_XXL, "diffusers")
  assert {key: list(e.shape) for key, e in table.items()} == want
  init = functools.partial(
    models.TextEncoder(models.UMT5_XXL).init, jax.random.key(0)
  )
  one = jnp.ones((1, 1), jnp.int32)
  shapes = jax.eval_shape(init, one, one == 1)["params"]
  flat = {path: a.shape for path, a in _torch.flatten(shapes).items()}
  for layout in ("wan", "diffusers"):
    table = _torch.TEXT.table(models.UMT5_XXL, layout)
    assert {entry.path for entry in table.values()} == flat.keys()
  sizes = [np.prod(shape, dtype=float) for shape in want.values()]
  assert sum(np.prod(s, dtype=float) for s in flat.values()) == sum(sizes)


def test_both_layouts():
  original = models.params_to_torch(params(), CONFIG)
  assert original["blocks.1.ffn.gate.0.weight"].shape == (24, 16)
  assert original["blocks.1.pos_embedding.embedding.weight"].shape == (32, 3)
  np.testing.assert_array_equal(
    original["token_embedding.weight"], state()["shared.weight"]
  )
  for arrays in (original, state()):
    config, back = models.params_from_torch(arrays)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, back, params())
  twice = state() | {"encoder.embed_tokens.weight": state()["shared.weight"]}
  models.params_from_torch(twice)


def tokenize(prompt):
  """One token a word, then the end."""
  return [2 + len(word) for word in prompt.split()] + [1]


@functools.cache
def embed():
  return models.prompt_embedder(MODEL, params(), tokenize, length=6)


def test_embeddings_are_zero_after_the_prompt():
  both = embed()(["a cat sits", "dogs"])
  assert both.shape == (2, 6, 16)
  assert both.dtype == np.float32
  assert np.all(both[0, 4:] == 0)
  assert np.all(both[1, 2:] == 0)
  assert np.all(np.any(both[0, :4] != 0, axis=-1))
  # Padding and the other prompt do not matter.
  tokens, mask = jnp.array([[6, 1]]), jnp.ones((1, 2), bool)
  alone = quick_jit(MODEL.apply)({"params": params()}, tokens, mask)
  np.testing.assert_allclose(both[1, :2], alone[0], atol=1e-5)


def test_long_prompts_are_cut_with_a_warning():
  prompt = "one two three " * 300
  with pytest.warns(UserWarning, match=r"901 tokens and is cut to 512.*'one t"):
    tokens = models.prompt_tokens(prompt, tokenize)
  assert len(tokens) == 512
  assert tokens[-1] == 1
  assert tokens[:-1] == tokenize(prompt)[:511]
  assert len(models.prompt_tokens("a " * 511, tokenize)) == 512


def test_prompts_are_cleaned():
  assert _prompts.clean_prompt(" a &amp;amp;\n\tb  c ") == "a & b c"


def test_embeddings_are_kept(tmp_path):
  asked = []

  def counted(prompts):
    asked.append(list(prompts))
    return embed()(prompts)

  kept = models.CachedEmbedder(counted, tmp_path, identity="tiny")
  want = embed()(["a cat", "dogs", ""])
  np.testing.assert_array_equal(kept(["a cat", "dogs", ""]), want)
  np.testing.assert_array_equal(kept(["dogs", "a  cat"]), want[[1, 0]])
  assert asked == [["a cat", "dogs", ""]]
  kept(["a cat", "birds"])
  assert asked[1:] == [["birds"]]
  other = models.CachedEmbedder(counted, tmp_path, identity="another")
  other(["dogs"])
  assert asked[2:] == [["dogs"]]
  assert len(list(tmp_path.iterdir())) == 5

  for path in tmp_path.iterdir():  # a crash, a full disk
    path.write_bytes(path.read_bytes()[:-4])
  with pytest.warns(UserWarning, match="broken and made anew"):
    np.testing.assert_array_equal(kept(["dogs"]), want[1:2])
  np.testing.assert_array_equal(kept(["dogs"]), want[1:2])


def test_embedding_goes_on_where_it_was_stopped(tmp_path):
  """Each is on disk before the next one is made."""
  asked = []

  def one_by_one(prompts):
    for prompt in prompts:
      if len(asked) == 2:
        asked.append(None)
        raise KeyboardInterrupt
      asked.append(prompt)
      yield np.full((4, 3), len(asked), np.float32)

  kept = models.CachedEmbedder(one_by_one, tmp_path, identity="tiny")
  with pytest.raises(KeyboardInterrupt):
    kept.prepare(["a", "b", "c"])
  assert [p.suffix for p in tmp_path.iterdir()] == [".safetensors"] * 2
  kept.prepare(["a", "b", "c"])
  assert asked == ["a", "b", None, "c"]
  assert kept(["c", "a"])[:, 0, 0].tolist() == [4, 1]


def test_bfloat16_stays_close():
  half = models.TextEncoder(
    models.TextConfig(
      **{**_fields(CONFIG), "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    )
  )
  tokens, mask = jnp.int32(recorded()["tokens"]), recorded()["mask"]
  cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
  got = quick_jit(half.apply)({"params": cast}, tokens, mask)[mask]
  assert got.dtype == jnp.float32
  want = recorded()["embeddings"][mask]
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert 1e-4 < error < 0.03


def _fields(config):
  return {name: getattr(config, name) for name in config.__dataclass_fields__}


SHARDED = """
import functools, jax, numpy as np, test_text_encoder as t
from crcm_jax import models
from crcm_jax.training import sharding

config = models.TextConfig(**{**t._fields(t.CONFIG), "heads": 2})
table = t._torch.TEXT.table(config, "wan")
state = t.wan_weights.state_dict({k: e.shape for k, e in table.items()})
mesh = sharding.make_mesh(fsdp=2, tensor=2)
place = functools.partial(sharding.shard, mesh=mesh, rules=models.TEXT_RULES)
_, params = models.params_from_torch(state, config, shardings=place)
_, whole = models.params_from_torch(state, config)
for name, axes in dict(
  query=(None, "fsdp", "tensor"), down=(None, "tensor", "fsdp")
).items():
  kernel = params["blocks"][name]["kernel"]
  assert tuple(kernel.sharding.spec) == axes, kernel.sharding
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
assert params["embedding"].addressable_shards[0].data.shape == (40, 8)
apply = jax.jit(models.TextEncoder(config).apply)
args = np.int32(t.recorded()["tokens"]), t.recorded()["mask"]
got, want = (apply({"params": p}, *args) for p in (params, whole))
assert len(got.sharding.device_set) == 4
np.testing.assert_allclose(got, want, atol=1e-4)
"""


def test_sharded_by_its_rules():
  """On four devices, in a process of its own, the result is the same."""
  paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
  env = os.environ | {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "PYTHONPATH": os.pathsep.join(paths),
  }
  done = subprocess.run(
    [sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
