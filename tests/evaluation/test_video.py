"""Writing videos: what comes back, and what bad paths are told."""

import pathlib
import subprocess

import imageio.v3 as imageio
import imageio_ffmpeg
import numpy as np
import pytest

from crcm_jax import evaluation


def _read_mp4(path, size):
  """Decodes to grey frames of a known (height, width)."""
  tool = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path)]
  tool += ["-f", "rawvideo", "-pix_fmt", "gray", "-"]
  raw = subprocess.run(tool, check=True, capture_output=True).stdout
  return np.frombuffer(raw, np.uint8).reshape(-1, *size)


@pytest.fixture
def clip():
  """A square that moves over a grey ramp, uint8 [5, 16, 16]."""
  video = np.tile(np.arange(16, dtype=np.uint8) * 8, (5, 16, 1))
  for i in range(5):
    video[i, 4:8, 2 * i : 2 * i + 4] = 255
  return video


def test_gif_round_trip_is_exact(tmp_path, clip):
  path = evaluation.write_video(tmp_path / "a.gif", clip, min_size=64)
  back = np.stack([f[..., 0] for f in imageio.imread(path, index=None)])
  np.testing.assert_array_equal(back, clip.repeat(4, 1).repeat(4, 2))


def test_mp4_round_trip_is_close(tmp_path, clip):
  path = evaluation.write_video(tmp_path / "a.mp4", clip, min_size=96)
  back = _read_mp4(path, (96, 96))
  wanted = clip.repeat(6, 1).repeat(6, 2)
  assert back.shape == wanted.shape
  assert np.abs(back.astype(float) - wanted).mean() < 4


def test_mp4_of_odd_size_is_padded_to_even(tmp_path):
  video = np.full((3, 33, 35, 3), 200, np.uint8)
  path = evaluation.write_video(tmp_path / "a.mp4", video, min_size=1)
  back = _read_mp4(path, (34, 36))
  assert len(back) == 3
  assert np.abs(back.astype(int) - 200).max() < 4


@pytest.mark.parametrize(
  ("frames", "grid"), [(5, (1, 5)), (12, (1, 12)), (21, (5, 5))]
)
def test_png_shows_all_frames(tmp_path, frames, grid):
  video = np.zeros((frames, 8, 8, 3), np.float32)
  path = evaluation.write_video(tmp_path / "a.png", video, min_size=8)
  rows, columns = grid
  assert imageio.imread(path).shape == (12 * rows - 4, 12 * columns - 4, 3)


def test_floats_are_clipped_and_non_finite_pixels_are_grey(tmp_path):
  video = np.array([-5, -1, 0, 1, 5, np.nan, np.inf, -np.inf], np.float32)
  path = evaluation.write_video(
    tmp_path / "a.png", video.reshape(1, 2, 4, 1), min_size=2
  )
  grey = [0, 0, 128, 255, 255, 128, 128, 128]
  np.testing.assert_array_equal(imageio.imread(path).ravel(), grey)


def test_unknown_suffix_names_the_known_ones(tmp_path, clip):
  with pytest.raises(
    ValueError, match=r"`path` must end in one of \.mp4, \.gif"
  ):
    evaluation.write_video(tmp_path / "a.webm", clip)


def test_missing_folder_is_named(tmp_path, clip):
  with pytest.raises(FileNotFoundError, match=r"'.*nowhere' does not"):
    evaluation.write_video(tmp_path / "nowhere" / "a.gif", clip)


def test_no_permission_is_said_and_leaves_nothing(tmp_path, clip, monkeypatch):
  def deny(*args):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "replace", deny)
  with pytest.raises(
    PermissionError, match=r"`path` must be writable; '.*a.gif"
  ):
    evaluation.write_video(tmp_path / "a.gif", clip)
  assert list(tmp_path.iterdir()) == []


def test_a_failure_keeps_the_old_file_and_leaves_no_other(
  tmp_path, clip, monkeypatch
):
  path = evaluation.write_video(tmp_path / "a.gif", clip)
  old = path.read_bytes()

  def fill_disk(self, data):
    with self.open("wb") as file:
      file.write(data[:10])
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(pathlib.Path, "write_bytes", fill_disk)
  with pytest.raises(OSError, match="No space"):
    evaluation.write_video(path, 255 - clip)
  assert path.read_bytes() == old
  assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  "shape", [(4, 4), (2, 3, 4, 4, 1), (3, 4, 4, 16), (0, 4, 4)]
)
def test_what_is_no_video_is_told_its_shape(tmp_path, shape, unchecked):
  with pytest.raises(ValueError, match=r"`video` must have shape \[f, h, w\]"):
    evaluation.write_video(tmp_path / "a.gif", np.zeros(shape))


def test_encoding_in_memory_equals_the_file(tmp_path, clip):
  path = evaluation.write_video(tmp_path / "a.gif", clip, min_size=16)
  data = evaluation.encode_video(clip, ".gif")
  assert path.read_bytes() == data
