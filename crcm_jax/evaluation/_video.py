"""Videos as files: mp4, gif, or a png that shows all frames at once.

A small canvas is enlarged by whole factors with nearest neighbours, so that
each of its pixels stays a crisp square. A file appears under its final name
only when it is complete.
"""

import io
import math
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8

from crcm_jax import _extras

_GAP = 4  # pixels between the frames of a png
_GAP_VALUE = 128
_STRIP = 12  # so many frames lie in one row; more, about in a square


def write_video(
  path: str | os.PathLike[str],
  video: Shaped[np.ndarray, "f h w"] | Shaped[np.ndarray, "f h w c"],
  *,
  fps: float = 8.0,
  min_size: int = 256,
) -> pathlib.Path:
  """Writes one video; the suffix of `path` chooses the format.

  `.mp4` and `.gif` move, `.png` shows all frames side by side.

  Args:
    path: where the file goes; its folder must exist.
    video: floats in [-1, 1] or uint8; c is 1 (grey) or 3 (RGB).
    fps: frames per second.
    min_size: a canvas shorter than this is enlarged by the smallest whole
      factor that makes its shorter side at least this long.

  Returns:
    The path of the finished file.

  Raises:
    ValueError: if the suffix is unknown or `video` is no video.
    FileNotFoundError: if the folder is missing.
    PermissionError: if the folder does not let us write.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in _ENCODERS:
    raise ValueError(
      f"`path` must end in one of {', '.join(_ENCODERS)}; got {str(path)!r}."
      " Choose the format by the suffix."
    )
  if not path.parent.is_dir():
    raise FileNotFoundError(
      f"`path` must lie in a folder that exists; {str(path.parent)!r} does"
      " not. Create it first."
    )
  data = encode_video(video, path.suffix, fps=fps, min_size=min_size)
  write_whole(path, data)
  return path


def encode_video(
  video: Shaped[np.ndarray, "f h w"] | Shaped[np.ndarray, "f h w c"],
  suffix: str,
  *,
  fps: float = 8.0,
  min_size: int = 1,
) -> bytes:
  """Encodes one video in memory.

  Args:
    video: as in `write_video`.
    suffix: `".mp4"`, `".gif"` or `".png"`.
    fps: frames per second.
    min_size: as in `write_video`.

  Returns:
    The bytes of the file.
  """
  frames = _enlarge(to_uint8(video), min_size)
  return _ENCODERS[suffix.lower()](frames, fps)


def to_uint8(
  video: Shaped[np.ndarray, "f h w"] | Shaped[np.ndarray, "f h w c"],
) -> UInt8[np.ndarray, "f h w"] | UInt8[np.ndarray, "f h w 3"]:
  """Maps floats in [-1, 1] to 0..255, clipping; a single channel is dropped.

  Args:
    video: floats in [-1, 1], or uint8 that is kept. A value that is not
      finite becomes mid-grey.

  Returns:
    The frames as a picture library wants them.

  Raises:
    ValueError: if the axes are not frames, height, width and 1 or 3 channels.
  """
  video = np.asarray(video)
  if video.ndim == 4 and video.shape[-1] == 1:
    video = video[..., 0]
  grey, colour = video.ndim == 3, video.ndim == 4 and video.shape[-1] == 3
  if not (grey or colour) or 0 in video.shape:
    raise ValueError(
      "`video` must have shape [f, h, w] or [f, h, w, c] with 1 or 3 channels;"
      f" got {list(video.shape)}. Decode latents to pixels first, and write one"
      " clip at a time."
    )
  if video.dtype == np.uint8:
    return video
  video = np.nan_to_num(video.astype(np.float32), posinf=0.0, neginf=0.0)
  return np.round((np.clip(video, -1, 1) + 1) * 127.5).astype(np.uint8)


def contact_sheet(
  frames: UInt8[np.ndarray, "f h w"] | UInt8[np.ndarray, "f h w 3"],
  *,
  columns: int,
) -> (
  UInt8[np.ndarray, "sheet_h sheet_w"] | UInt8[np.ndarray, "sheet_h sheet_w 3"]
):
  """Lays frames out in rows, in reading order.

  Args:
    frames: of one clip.
    columns: frames in a row.

  Returns:
    One picture, with grey gaps.
  """
  count, height, width = frames.shape[:3]
  rows = math.ceil(count / columns)
  cell_h, cell_w = height + _GAP, width + _GAP
  size = (rows * cell_h - _GAP, columns * cell_w - _GAP, *frames.shape[3:])
  sheet = np.full(size, _GAP_VALUE, np.uint8)
  for i, frame in enumerate(frames):
    top, left = (i // columns) * cell_h, (i % columns) * cell_w
    sheet[top : top + height, left : left + width] = frame
  return sheet


def write_whole(path: pathlib.Path, data: bytes) -> None:
  """Writes a file under another name, then renames: all of it or nothing.

  Args:
    path: the final name.
    data: the contents.

  Raises:
    PermissionError: if the folder or an old file does not let us write.
  """
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
  try:
    unfinished.write_bytes(data)
    unfinished.replace(path)
  except PermissionError as error:
    raise PermissionError(
      f"`path` must be writable; {str(path)!r} is not ({error.strerror})."
      " Choose another folder or change its permissions."
    ) from error
  finally:
    unfinished.unlink(missing_ok=True)


def _enlarge(frames: np.ndarray, min_size: int) -> np.ndarray:
  """Repeats pixels by a whole factor until the shorter side is long enough."""
  factor = math.ceil(min_size / min(frames.shape[1:3]))
  return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _encode_mp4(frames: np.ndarray, fps: float) -> bytes:
  """Pipes raw frames through ffmpeg.

  `imageio` would fork this process, which JAX, having threads, warns of.
  """
  ffmpeg: Any = _extras.require("imageio_ffmpeg", extra="video")
  # H.264 in its most widely playable form (yuv420p) wants even sides.
  _, height, width = frames.shape[:3]
  pad = [(0, 0), (0, height % 2), (0, width % 2)]
  frames = np.pad(frames, pad + [(0, 0)] * (frames.ndim - 3), mode="edge")
  size = f"{frames.shape[2]}x{frames.shape[1]}"
  kind = "gray" if frames.ndim == 3 else "rgb24"
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "video.mp4")
    command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", kind, "-s", size, "-r", str(fps), "-i", "-"]
    command += ["-c:v", "libx264", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path.read_bytes()


def _encode_gif(frames: np.ndarray, fps: float) -> bytes:
  first, *rest = _pictures(frames)
  file = io.BytesIO()
  first.save(
    file,
    format="GIF",
    save_all=True,
    append_images=rest,
    duration=round(1000 / fps),
    loop=0,
  )
  return file.getvalue()


def _encode_png(frames: np.ndarray, fps: float) -> bytes:
  del fps  # a still picture
  file = io.BytesIO()
  count = len(frames)
  columns = count if count <= _STRIP else math.ceil(math.sqrt(count))
  (sheet,) = _pictures(contact_sheet(frames, columns=columns)[None])
  sheet.save(file, format="PNG")
  return file.getvalue()


def _pictures(frames: np.ndarray) -> list[Any]:
  image: Any = _extras.require("PIL.Image", extra="video")
  return [image.fromarray(frame) for frame in frames]


_ENCODERS: dict[str, Callable[[np.ndarray, float], bytes]] = {
  ".mp4": _encode_mp4,
  ".gif": _encode_gif,
  ".png": _encode_png,
}

SUFFIXES = tuple(_ENCODERS)
"""What the name of a video may end in."""
