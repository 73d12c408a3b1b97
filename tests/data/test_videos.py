"""Videos with captions: found, decoded, encoded; and `crcm encode`."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
import torch_files
import wan_weights

from crcm_jax import cli, data, evaluation, models
from crcm_jax.data import BadRecord, LatentExample
from crcm_jax.models import _encoders, _torch

pytestmark = pytest.mark.usefixtures("restore_logging")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("tensorflow_datasets")

VAE = dataclasses.replace(
  models.WAN_VAE, width=4, multipliers=(1, 1), time=(True,), blocks=1
)
TEXT = models.TextConfig(
  layers=1, width=8, heads=1, head_width=8, ffn_width=8, vocabulary=40
)
SIZE = dict(frames=5, size=(16, 24), fps=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two good videos, one in a folder of its own, and four bad ones."""
  folder = tmp_path_factory.mktemp("videos")
  (folder / "b").mkdir()
  ramp = np.linspace(-1, 1, 9, dtype=np.float32)[:, None, None]
  clip = np.broadcast_to(ramp, (9, 32, 32))
  for name in ("a.mp4", "b/b.mp4", "silent.mp4"):
    evaluation.write_video(folder / name, clip, fps=8.0, min_size=1)
  evaluation.write_video(folder / "short.mp4", clip[:3], fps=8.0, min_size=1)
  (folder / "web.mp4").write_text("<html>")
  raw = (folder / "a.mp4").read_bytes()
  (folder / "cut.mp4").write_bytes(raw[: len(raw) // 2])
  for name in ("a", "b/b", "short", "web", "cut"):
    (folder / f"{name}.txt").write_text(f"shows {name}\n")
  (folder / "notes.txt").write_text("no video")
  (folder / "silent.txt").write_bytes(b"\xff\xfe")
  (folder / "._a.mp4").write_bytes(b"what some systems leave behind")
  return folder


def test_a_folder_of_videos_with_captions_beside_them(folder):
  videos = {v.key: v.caption for v in data.find_videos(folder)}
  assert videos == {
    "a.mp4": "shows a", "b/b.mp4": "shows b/b", "cut.mp4": "shows cut",
    "short.mp4": "shows short", "silent.mp4": "", "web.mp4": "shows web",
  }  # fmt: skip


def test_captions_in_one_file(folder, tmp_path):
  rows = [("a.mp4", "one, two"), ("none.mp4", "gone")]
  table, lines = tmp_path / "c.csv", tmp_path / "c.jsonl"
  table.write_text('video,caption\na.mp4,"one, two"\nnone.mp4,gone\n')
  lines.write_text(
    "\n".join(json.dumps(dict(video=v, caption=c)) for v, c in rows)
  )
  for captions in (table, lines):
    found = data.find_videos(folder, captions)
    assert [(v.key, v.caption) for v in found] == rows
    assert found[0].path == folder / "a.mp4"
  table.write_text("video,text\na.mp4,one\n")
  with pytest.raises(ValueError, match="`caption` in each row; row 1"):
    data.find_videos(folder, table)
  lines.write_text('{"video": "a.mp4", "caption": "b"}\n\n')
  with pytest.raises(ValueError, match="line 2 is ''"):
    data.find_videos(folder, lines)
  with pytest.raises(ValueError, match="has none"):
    data.find_videos(tmp_path)
  with pytest.raises(FileNotFoundError, match="there is no"):
    data.find_videos(tmp_path / "none")


def test_frames_are_resampled_scaled_and_cropped(folder):
  video = data.read_video(folder / "a.mp4", **SIZE)
  assert video.shape == (5, 16, 24, 3)
  brightness = video.mean(axis=(1, 2, 3))
  np.testing.assert_allclose(brightness, 255 * np.arange(5) / 8, atol=6)
  slow = data.read_video(folder / "a.mp4", frames=3, size=(16, 16), fps=4.0)
  np.testing.assert_allclose(
    slow.mean(axis=(1, 2, 3)), brightness[::2], atol=40
  )
  assert (np.diff(slow.mean(axis=(1, 2, 3))) > 40).all()


def test_videos_become_records_and_bad_ones_are_named(folder):
  seen = []

  def encode(video):
    seen.append((video.min(), video.max(), video.shape))
    return video[:, :, ::8, ::8]

  embed = lambda captions: np.ones((len(captions), 2, 3), np.float32)
  records = {
    r.key: r
    for r in data.encode_videos(data.find_videos(folder), encode, embed, **SIZE)
  }
  assert isinstance(records["a.mp4"], LatentExample)
  assert records["a.mp4"].latents.shape == (5, 2, 3, 3)
  assert records["b/b.mp4"].caption == "shows b/b"
  assert seen[0][0] < -0.9
  assert {shape for _, _, shape in seen} == {(1, 5, 16, 24, 3)}
  reasons = dict(
    silent="has no caption in UTF-8", short="at least 5 frames.* has 3",
    web="has 0; ffmpeg says: .*Invalid data", cut="has 0; ffmpeg says",
  )  # fmt: skip
  for key, reason in reasons.items():
    bad = records[f"{key}.mp4"]
    assert isinstance(bad, BadRecord)
    assert re.search(reason, bad.reason), bad


def test_what_was_encoded_is_not_encoded_again(folder, tmp_path):
  calls = []

  def encode(video):
    calls.append(1)
    return video[:, :, ::8, ::8]

  embed = lambda captions: np.ones((len(captions), 2, 3), np.float32)

  def run(**changes):
    settings = SIZE | dict(keep=tmp_path / "keep") | changes
    records = data.encode_videos(
      data.find_videos(folder), encode, embed, **settings
    )
    return {r.key: r for r in records if isinstance(r, LatentExample)}

  first, second = run(), run()
  assert len(calls) == 2
  assert first.keys() == second.keys() == {"a.mp4", "b/b.mp4"}
  for key, record in first.items():
    np.testing.assert_array_equal(record.latents, second[key].latents)
    np.testing.assert_array_equal(record.embedding, second[key].embedding)
    assert record.caption == second[key].caption
  run(fps=4.0)  # another setting, another clip
  assert len(calls) == 4
  assert run(frames=3).keys() == first.keys() | {"short.mp4"}
  assert len(calls) == 7
  assert not list((tmp_path / "keep").glob("*.part"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The encoders of a tiny Wan, under the original's names."""
  folder = tmp_path_factory.mktemp("weights")
  for network, config, name in (
    (_torch.VAE, VAE, "Wan2.1_VAE.pth"),
    (_torch.TEXT, TEXT, "models_t5_umt5-xxl-enc-bf16.pth"),
  ):
    table = network.table(config, "wan")
    state = wan_weights.state_dict({k: e.shape for k, e in table.items()})
    params = models.params_from_torch(state, config)[1]
    models.save_torch(folder / name, params, config, {})
  (folder / "google" / "umt5-xxl").mkdir(parents=True)
  return folder


def run(*words):
  return cli.main(["encode", *map(str, words)])


def _tokenize(prompt):
  return [*(2 + len(word) for word in prompt.split()), 1]


def test_a_folder_from_the_command_line(
  folder, weights, tmp_path, capsys, monkeypatch
):
  # Tokenizers have tests of their own, and an extra of their own.
  monkeypatch.setattr(_encoders, "load_tokenizer", lambda path: _tokenize)
  words = (folder, "--out", tmp_path, "--name", "mine", "--weights", weights)
  words += ("--size", "16x32", "--frames", "5", "--fps", "8")
  with tiny.compile_fast():
    assert run(*words) == 0
  shown = capsys.readouterr()
  where = shown.out.strip()
  assert where == str(tmp_path / "wan_latents" / "mine" / "1.0.0")
  assert [p.name for p in (tmp_path / "wan_latents").iterdir()] == ["mine"]
  info = data.describe_wan_latents(where)
  assert info.examples == 2
  assert info.latents == (3, 8, 16, 16)
  assert info.embedding == (512, 8)
  assert info.skipped.keys() == {
    "cut.mp4", "short.mp4", "silent.mp4", "web.mp4"
  }  # fmt: skip
  assert "Skipped: silent.mp4 has no caption in UTF-8\n" in shown.err
  batch = next(data.wan_latents_batches(where, batch_size=2))
  assert np.isfinite(batch.x_0).all()
  assert batch.x_0.std() > 0
  # "shows a" and "shows b/b" end with a third token, the null prompt at once.
  assert (batch.condition.any(axis=-1).sum(axis=-1) == 3).all()
  assert (batch.null_condition.any(axis=-1).sum(axis=-1) == 1).all()
  assert run(*words) == 2
  assert "`name` must be new" in capsys.readouterr().err


def test_shards_from_the_command_line(tmp_path, capsys):
  array = np.ones((16, 2, 4, 4), np.float32)
  raw = torch_files.torch_bytes(array)
  text = torch_files.torch_bytes(np.ones((2, 3), np.float32))
  shard = torch_files.write_tar(
    tmp_path / "s.tar", {"0.latent.pt": raw, "0.embed.pt": text,
                         "0.prompt.txt": b"a"})  # fmt: skip
  words = (shard, "--out", tmp_path / "data", "--name", "x")
  assert run(*words) == 2
  assert "`--null-embedding` must be" in capsys.readouterr().err
  (tmp_path / "null.pt").write_bytes(text)
  assert run(*words, "--null-embedding", tmp_path / "null.pt") == 0
  where = capsys.readouterr().out.strip()
  assert data.describe_wan_latents(where).examples == 1
  np.save(tmp_path / "null.npy", np.ones(3))
  with pytest.raises(ValueError, match="must have 2 axes"):
    data.read_embedding(tmp_path / "null.npy")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "`--weights` must be the folder"),
    (("--weights", "nowhere"), "lacks: autoencoder .vae or"),
    (("--weights", "x", "--frames", "6"), "must have 4k . 1 frames"),
    (("--weights", "x", "--size", "20x24"), "divisible by 8"),
    (("--weights", "x", "--size", "16x24"), "divisible by 16"),
    (("--name", "a/b"), "`name` must consist of"),
    (("s.tar",), "one folder of videos, or tar shards"),
  ],
)
def test_bad_arguments_say_what_is_wrong(
  folder, tmp_path, words, message, capsys
):
  usual = (folder, *words[:1], "--out", tmp_path, "--name", "x")
  if words[:1] != ("s.tar",):
    usual = (folder, "--out", tmp_path, "--name", "x", *words)
  assert run(*usual) == 2
  assert re.search(message, capsys.readouterr().err)


def test_a_size_that_is_none(folder, capsys):
  with pytest.raises(SystemExit):
    run(folder, "--out", "x", "--name", "x", "--size", "480")
  assert "must be HEIGHTxWIDTH" in capsys.readouterr().err
