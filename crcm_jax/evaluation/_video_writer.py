"""A video file that grows as its frames are made.

It has another name until it is whole: a run that ends early leaves nothing
under the final one.
"""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from crcm_jax import _extras
from crcm_jax.evaluation._video import SUFFIXES, write_video

Write = Callable[[np.ndarray], None]
"""Appends frames, uint8 `[t, h, w, 3]`."""


@contextlib.contextmanager
def video_writer(
  path: str | os.PathLike[str], *, fps: float
) -> Iterator[Write]:
  """Opens a video to append frames to.

  An mp4 is encoded as frames come; other formats at the end.

  Args:
    path: where the file goes, when the block ends without an error.
    fps: frames per second.

  Yields:
    A function that appends frames of one even size, uint8 `[t, h, w, 3]`.

  Raises:
    ValueError: if the suffix is unknown.
    FileNotFoundError: if the folder is missing.
    OSError: if the file cannot be written.
  """
  path = pathlib.Path(path)
  if path.suffix.lower() not in SUFFIXES:
    raise ValueError(
      f"`path` must end in one of {', '.join(SUFFIXES)}; got {str(path)!r}."
      " Choose the format by the suffix."
    )
  if not path.parent.is_dir():
    raise FileNotFoundError(
      f"`path` must lie in a folder that exists; {str(path.parent)!r} does"
      " not. Create it first."
    )
  if path.suffix.lower() == ".mp4":
    with _mp4(path, fps) as write:
      yield write
    return
  frames: list[np.ndarray] = []
  yield frames.append
  if frames:
    write_video(path, np.concatenate(frames), fps=fps, min_size=1)


@contextlib.contextmanager
def _mp4(path: pathlib.Path, fps: float) -> Iterator[Write]:
  unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
  process: Any = None

  def write(frames: np.ndarray) -> None:
    nonlocal process
    if process is None:
      process = _start_ffmpeg(unfinished, frames.shape[1:3], fps)
    try:
      process.stdin.write(np.ascontiguousarray(frames).data)
    except BrokenPipeError as error:
      raise _failure(path, process) from error

  try:
    yield write
    if process is not None:
      process.stdin.close()
      if process.wait():
        raise _failure(path, process)
      unfinished.replace(path)
  finally:
    if process is not None:
      process.kill()
      process.wait()
      process.stderr.close()
      with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    unfinished.unlink(missing_ok=True)


def _start_ffmpeg(path: pathlib.Path, size: tuple[int, ...], fps: float) -> Any:
  ffmpeg: Any = _extras.require("imageio_ffmpeg", extra="video")
  command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo"]
  command += ["-pix_fmt", "rgb24", "-s", f"{size[1]}x{size[0]}"]
  command += ["-r", str(fps), "-i", "-", "-c:v", "libx264"]
  command += ["-pix_fmt", "yuv420p", "-f", "mp4", str(path)]
  return subprocess.Popen(
    command, stdin=subprocess.PIPE, stderr=subprocess.PIPE
  )


def _failure(path: pathlib.Path, process: Any) -> OSError:
  said = process.stderr.read().decode(errors="replace").strip()
  return OSError(f"`path` could not be written; ffmpeg, for {path}: {said}")
