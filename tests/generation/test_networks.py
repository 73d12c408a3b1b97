"""Networks from folders laid out as others lay them out."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax import cli, generation, models
from crcm_jax.chunks import ChunkPattern
from crcm_jax.commands import _wan

WAN = models.WanConfig(
  layers=1,
  width=128,
  heads=1,
  ffn_width=8,
  freq_width=16,
  text_width=64,
  text_length=512,
)
VAE = generation.RANDOM["tiny"][1]
TEXT = models.TextConfig(
  layers=1, width=64, heads=1, head_width=64, ffn_width=8, vocabulary=8
)
WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4, "dog": 5}


def _params(model, *args):
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
  draw = lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype)
  return jax.tree.map(draw, shapes)


@pytest.fixture(scope="module")
def params():
  x, t = jnp.zeros((1, 1, 2, 2, 16)), jnp.zeros((1, 1))
  tokens = jnp.zeros((1, 4), jnp.int32)
  return (
    _params(models.Wan(WAN), x, t, jnp.zeros((1, 512, 64))),
    _params(models.Vae(VAE), jnp.zeros((1, 5, 16, 16, 3))),
    _params(models.TextEncoder(TEXT), tokens, tokens == 0),
  )


def _save(folder, params, layout, names, about=None):
  tokenizers = pytest.importorskip("tokenizers")
  for name, network, config in zip(
    names, params, (WAN, VAE, TEXT), strict=False
  ):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    models.save_torch(path, network, config, about or {}, layout=layout)
  words = tokenizers.models.WordLevel(WORDS, unk_token="<unk>")
  tokenizer = tokenizers.Tokenizer(words)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  place = folder / names[3]
  place.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(place / "tokenizer.json"))


LAYOUTS = {
  "wan": (
    "diffusion_pytorch_model.safetensors",
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "google/umt5-xxl",
  ),
  "diffusers": (
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer",
  ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder(tmp_path, params, layout):
  folder = tmp_path / "weights"
  names = LAYOUTS[layout]
  _save(folder, params, layout, names)
  load = lambda **settings: generation.load_networks(
    folder, cache=tmp_path / "cache", **settings
  )
  networks = load()
  assert networks.params["head"]["out"]["kernel"].dtype == jnp.bfloat16
  config = networks.transformer.config
  assert (config.width, config.dtype) == (128, jnp.bfloat16)
  assert networks.vae.config.width == VAE.width
  embeddings = networks.embed(["a cat", ""])
  assert embeddings.shape == (2, 512, 64)
  assert np.abs(embeddings[0, :3]).min(axis=0).max() > 0
  assert (embeddings[0, 3:] == 0).all()  # a, cat, </s>
  assert load().weights_hash == networks.weights_hash

  # The prompts that are known do not need the encoder.
  encoder = folder / names[2]
  content = encoder.read_bytes()
  shutil.rmtree(folder / names[3])
  (folder / names[3]).mkdir()
  np.testing.assert_array_equal(load().embed(["", "a cat"])[1], embeddings[0])
  encoder.write_bytes(content[:-1] + b"\x11")  # another encoder
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
    load().embed(["a cat"])


def test_a_student_beside_the_rest(tmp_path, params):
  folder, student = tmp_path / "w", tmp_path / "student.safetensors"
  _save(folder, params, "wan", LAYOUTS["wan"])
  about = {"pattern": {"first": 1, "rest": 3}}
  models.save_torch(student, params[0], WAN, about, layout="diffusers")
  load = lambda path: generation.load_networks(
    folder, transformer=path, cache=tmp_path, dtype=jnp.dtype("float32")
  )
  networks = load(student)
  trained = ChunkPattern(1, 3)
  assert generation.trained_pattern(networks.about) == trained

  ours = tmp_path / "ours.safetensors"
  models.convert(student, ours)
  again = load(ours)
  assert again.transformer == networks.transformer
  assert generation.trained_pattern(again.about) == trained
  jax.tree.map(np.testing.assert_array_equal, again.params, networks.params)
  with pytest.raises(ValueError, match="must hold what a WanConfig describes"):
    load(folder / "Wan2.1_VAE.pth")


def test_from_a_folder_and_a_prompt_to_a_video(
  tmp_path, params, monkeypatch, capsys
):
  folder, out = tmp_path / "w", tmp_path / "a.mp4"
  about = {"pattern": {"first": 1, "rest": 1}}
  _save(folder, params, "wan", LAYOUTS["wan"], about)
  monkeypatch.setattr(_wan, "CACHE", tmp_path / "cache")
  monkeypatch.setattr(cli, "_log_to_stderr", lambda: None)
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "as it is")
  words = ["sample", "--weights", str(folder), "--prompt", "a cat"]
  words += ["--out", str(out), "--size", "48x32", "--frames", "5"]
  words += ["--dtype", "float32", "--steps", "1"]
  with tiny.compile_fast():
    assert cli.main(words) == 0
  assert out.stat().st_size > 0
  record = json.loads((tmp_path / "a.json").read_text())
  assert record["pattern"] == about["pattern"]  # as the weights say
  weights = (folder / LAYOUTS["wan"][0]).read_bytes()
  assert record["weights"] == hashlib.sha256(weights).hexdigest()
  assert len(list((tmp_path / "cache" / "prompts").iterdir())) == 2
  out.unlink()
  assert cli.main([*words, "--pattern", "2,1", "--frames", "9"]) == 2
  assert "their pattern is ChunkPattern(first=1" in capsys.readouterr().err
  assert not out.exists()


def test_a_folder_that_lacks_files(tmp_path):
  (tmp_path / "vae").mkdir()
  load = lambda: generation.load_networks(tmp_path, cache=tmp_path)
  with pytest.raises(FileNotFoundError) as error:
    load()
  message = str(error.value)
  for part in (
    "transformer (transformer or transformer.safetensors or",
    "text encoder (text_encoder or",
    "tokenizer (tokenizer or google/umt5-xxl)",
    "Wan-AI/Wan2.1-T2V-1.3B",
  ):
    assert part in message
  assert "autoencoder" not in message
  for name in LAYOUTS["wan"][:3]:
    (tmp_path / name).write_text("<!doctype html>")
  (tmp_path / "tokenizer").mkdir()
  with pytest.raises(ValueError, match="is a web page"):
    load()


def test_an_index_of_shards_is_hashed_by_its_shards(tmp_path):
  from crcm_jax.generation import _networks

  index = tmp_path / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "a", "y": "b"}}))
  (tmp_path / "a").write_bytes(b"1")
  (tmp_path / "b").write_bytes(b"2")
  first = _networks._full_hash(index)
  (tmp_path / "b").write_bytes(b"3")
  assert _networks._full_hash(index) != first


def test_random_networks():
  with pytest.raises(ValueError, match=r"one of \['1.3B', 'tiny'\]"):
    generation.random_networks("14B")
  networks = generation.random_networks("tiny")
  assert networks.params["head"]["out"]["kernel"].std() > 0.01
  shapes = jax.tree.map(jnp.shape, networks.params)
  x, t = jnp.zeros((1, 1, 2, 2, 16)), jnp.zeros((1, 1))
  wanted = jax.eval_shape(
    networks.transformer.init, jax.random.key(0), x, t, jnp.zeros((1, 4, 8))
  )["params"]
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, wanted)
  again = generation.random_networks("tiny", seed=1)
  assert again.weights_hash != networks.weights_hash
