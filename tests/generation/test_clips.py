"""Clips as files: whole or not there, recorded, made once."""

import dataclasses
import json
import subprocess

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import tiny
import tiny_generation
from tiny_generation import generator, text

from crcm_jax import evaluation, generation


@pytest.fixture(autouse=True)
def _compile_fast():
  with tiny.compile_fast():
    yield


def _read(path, size):
  """Decodes a moving video; imageio would fork for an mp4."""
  tool = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
  tool += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
  raw = subprocess.run(tool, check=True, capture_output=True).stdout
  return np.frombuffer(raw, np.uint8).reshape(-1, *size, 3)


def _clip(folder, **changes):
  return generation.Clip(
    **(dict(path=folder / "a.mp4", prompt="a cat", seed=0) | changes)
  )


def test_a_clip_and_what_made_it(tmp_path):
  told = []
  made, clip = generator(), _clip(tmp_path)
  assert not generation.is_finished(clip, made)
  timing = generation.write_clip(clip, made, text(), None, progress=told.append)
  assert told == [1, 4, 4]
  assert timing.first > 0
  assert timing.steady > 0
  video = _read(clip.path, (32, 48))
  assert video.shape == (9, 32, 48, 3)
  # The codec loses detail: compare means of frames.
  means = lambda frames: frames.reshape(9, -1).mean(axis=1)
  assert np.abs(means(video) - means(tiny_generation.clip())).max() < 6
  record = json.loads((tmp_path / "a.json").read_text())
  assert record["prompt"] == "a cat"
  assert record["pattern"] == {"first": 1, "rest": 1}
  assert [len(times) for times in record["schedules"]] == [3, 2]
  assert record["weights"] == "random tiny, seed 0"
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "a.json",
    "a.mp4",
  ]

  assert generation.is_finished(clip, made)
  other = dataclasses.replace(clip, prompt="a dog", seed=1)
  with pytest.raises(ValueError, match=r"was made with other prompt, seed\."):
    generation.is_finished(other, made)
  (tmp_path / "a.json").write_text("{")
  assert not generation.is_finished(clip, made)
  (tmp_path / "a.mp4").unlink()
  assert not generation.is_finished(clip, made)


def test_a_clip_that_was_stopped_is_not_there(tmp_path):
  class Stop(Exception):
    pass

  def stop_at_once(frames):
    raise Stop

  clip = _clip(tmp_path)
  (tmp_path / "a.json").write_text("of an older clip")
  with pytest.raises(Stop):
    generation.write_clip(
      clip, generator(), text(), None, progress=stop_at_once
    )
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_a_video_is_written_as_it_comes(tmp_path, suffix):
  path = tmp_path / f"a{suffix}"
  frames = np.random.default_rng(0).integers(0, 255, (5, 16, 32, 3), np.uint8)
  with evaluation.video_writer(path, fps=16.0) as write:
    write(frames[:1])
    write(frames[1:])
    assert not path.exists()
  if suffix == ".mp4":
    assert len(_read(path, (16, 32))) == 5
  else:
    shown = iio.imread(path, index=None if suffix == ".gif" else 0)
    assert (
      shown.shape
      == {
        ".gif": (5, 16, 32, 3),
        ".png": (16, 5 * 36 - 4, 3),
      }[suffix]
    )
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


def _write_odd(path):
  """Writes frames of odd sides, which H.264 refuses."""
  with evaluation.video_writer(path, fps=16.0) as write:
    for _ in range(2000):
      write(np.zeros((1, 15, 15, 3), np.uint8))


def test_a_video_that_cannot_be_written(tmp_path):
  with (
    pytest.raises(ValueError, match="`path` must end in one of"),
    evaluation.video_writer(tmp_path / "a.avi", fps=16.0),
  ):
    pass
  with (
    pytest.raises(FileNotFoundError, match="folder that exists"),
    evaluation.video_writer(tmp_path / "b" / "a.mp4", fps=16.0),
  ):
    pass
  with pytest.raises(OSError, match="could not be written; ffmpeg"):
    _write_odd(tmp_path / "a.mp4")
  assert list(tmp_path.iterdir()) == []


def test_prompts_of_a_file(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("a cat\n a dog \n")
  assert generation.read_prompts(path) == ["a cat", "a dog"]
  path.write_text("a cat\n\na dog\n")
  with pytest.raises(ValueError, match="line 2 is empty"):
    generation.read_prompts(path)
  path.write_text("")
  with pytest.raises(ValueError, match="it is empty"):
    generation.read_prompts(path)


def test_an_image_is_fitted_to_the_frame(tmp_path):
  path = tmp_path / "a.png"
  picture = np.zeros((40, 20, 3), np.uint8)
  picture[5:35] = 255  # all that is left when a square is cut out
  iio.imwrite(path, picture)
  image = generation.load_image(path, 16, 16)
  assert image.shape == (16, 16, 3)
  np.testing.assert_array_equal(image, 1)
  iio.imwrite(path, picture[..., 0])
  assert generation.load_image(path, 32, 16).min() == -1


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PNG\r\n\x1a\n"])
def test_an_image_without_pixels(tmp_path, content):
  path = tmp_path / "a.png"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=f"of {len(content)} bytes, is not"):
    generation.load_image(path, 16, 16)
  with pytest.raises(FileNotFoundError):
    generation.load_image(tmp_path / "b.png", 16, 16)


def test_an_image_of_zero_size(tmp_path):
  path = tmp_path / "a.ppm"
  path.write_bytes(b"P6 0 4 255\n")
  with pytest.raises(ValueError, match="`image` must be a picture with pixels"):
    generation.load_image(path, 16, 16)
