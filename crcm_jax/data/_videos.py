"""Folders of videos with captions, decoded and handed to encoders."""

import csv
import hashlib
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import UInt8

from crcm_jax._extras import require
from crcm_jax.data._records import BadRecord, LatentExample, Records

_Encoded: TypeAlias = tuple[np.ndarray, np.ndarray]  # latents, embedding

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
"""Of the files that are taken for videos."""


class VideoFile(NamedTuple):
  """A video on disk."""

  key: str
  """Its path within the folder."""
  path: pathlib.Path
  caption: str
  """Empty if there is none that can be read."""


def find_videos(
  folder: str | os.PathLike[str],
  captions: str | os.PathLike[str] | None = None,
) -> list[VideoFile]:
  """Lists the videos of a folder with their captions.

  Args:
    folder: holds the videos, also in folders of its own.
    captions: a `.csv` with the columns `video` and `caption`, or a `.jsonl`
      with an object of these keys a line; paths are relative to `folder`. None
      reads `NAME.txt` beside each `NAME.mp4`.

  Returns:
    The videos, in order.

  Raises:
    FileNotFoundError: if there is no such folder or file of captions.
    ValueError: if there is no video, or a line of `captions` lacks an entry.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise FileNotFoundError(
      f"`folder` must be a folder of videos; there is no {folder}."
    )
  if captions is None:
    paths = sorted(path for path in folder.rglob("*") if _is_video(path))
    said = ((path, _caption_beside(path)) for path in paths)
  else:
    rows = _read_captions(pathlib.Path(captions))
    said = ((folder / video, caption) for video, caption in rows)
  found = [
    VideoFile(os.path.relpath(path, folder), path, caption.strip())
    for path, caption in said
  ]
  if not found:
    raise ValueError(
      f"`folder` must hold videos ({', '.join(SUFFIXES)}); {folder} has none."
    )
  return found


def _is_video(path: pathlib.Path) -> bool:
  hidden = path.name.startswith(".")
  return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _caption_beside(path: pathlib.Path) -> str:
  try:
    return path.with_suffix(".txt").read_text(encoding="utf-8")
  except (FileNotFoundError, UnicodeDecodeError):
    return ""


def _read_captions(path: pathlib.Path) -> Iterator[tuple[str, str]]:
  """Yields (video, caption) of each line."""
  with path.open(newline="", encoding="utf-8") as file:
    rows = csv.DictReader(file) if path.suffix == ".csv" else _json_rows(file)
    for number, row in enumerate(rows, start=1):
      video, caption = row.get("video"), row.get("caption")
      if not (isinstance(video, str) and isinstance(caption, str) and video):
        raise ValueError(
          f"`captions` must say `video` and `caption` in each row; row {number}"
          f" of {path} is {row}."
        )
      yield video, caption


def _json_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise ValueError(
        f"`captions` must be a .csv, or a .jsonl with an object a line; line"
        f" {number} is {line.strip()[:60]!r}."
      )
    yield row


def read_video(
  path: str | os.PathLike[str],
  *,
  frames: int,
  size: tuple[int, int],
  fps: float,
) -> UInt8[np.ndarray, "f h w 3"]:
  """Decodes the start of a video, scaled and cropped to a size.

  Args:
    path: any file that ffmpeg reads.
    frames: how many to read.
    size: height and width; the video is scaled to cover them and cropped
      around its centre.
    fps: frames a second to read at; frames are dropped or repeated.

  Returns:
    The frames.

  Raises:
    ImportError: if the extra `video` is missing.
    ValueError: if the file is no video, or too short.
  """
  ffmpeg: Any = require("imageio_ffmpeg", extra="video")
  height, width = size
  fit = f"scale={width}:{height}:force_original_aspect_ratio=increase"
  # `file:`, lest a name be taken for an address.
  command = [ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error"]
  command += ["-i", f"file:{os.fspath(path)}", "-frames:v", str(frames)]
  command += ["-vf", f"fps={fps},{fit},crop={width}:{height}"]
  command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
  done = subprocess.run(command, capture_output=True)
  video = np.frombuffer(done.stdout, np.uint8)
  found = len(video) // (height * width * 3)
  if done.returncode or found < frames:
    said = done.stderr.decode(errors="replace").strip().splitlines()
    why = f"; ffmpeg says: {said[-1]}" if said else ""
    raise ValueError(
      f"`path` must be a video of at least {frames} frames at {fps:g} a second;"
      f" {os.fspath(path)} has {found}{why}."
    )
  return video.reshape(frames, height, width, 3)


def encode_videos(
  videos: Iterable[VideoFile],
  encode: Callable[[np.ndarray], Any],
  embed: Callable[[Sequence[str]], Any],
  *,
  frames: int = 81,
  size: tuple[int, int] = (480, 832),
  fps: float = 16.0,
  keep: str | os.PathLike[str] | None = None,
) -> Records:
  """Encodes videos and captions, one at a time.

  Args:
    videos: what `find_videos` returned.
    encode: pixels in [-1, 1] `[1, t, h, w, 3]` to latents `[1, f, h, w, c]`.
    embed: captions to embeddings `[b, l, d]`.
    frames: frames of a clip.
    size: height and width of a clip.
    fps: frames a second.
    keep: a folder, one for each pair of encoders, that keeps what is encoded:
      a run that was broken off goes on there. Remove it when all is done.

  Returns:
    An iterator over `LatentExample`, and `BadRecord` where there is no caption
    or the video cannot be decoded.
  """
  for video in videos:
    if not video.caption:
      yield BadRecord(video.key, "has no caption in UTF-8")
      continue
    path = None
    if keep is not None:
      path = _kept_path(pathlib.Path(keep), video, (frames, *size, fps))
    if (arrays := _read_kept(path)) is None:
      try:
        pixels = read_video(video.path, frames=frames, size=size, fps=fps)
      except ValueError as error:
        yield BadRecord(video.key, f"cannot be decoded: {error}")
        continue
      (latents,) = encode(pixels[None].astype(np.float32) / 127.5 - 1)
      (embedding,) = embed([video.caption])
      arrays = np.asarray(latents), np.asarray(embedding)
      _write_kept(path, arrays)
    yield LatentExample(video.key, *arrays, video.caption)


def _kept_path(
  keep: pathlib.Path, video: VideoFile, settings: tuple[int | float, ...]
) -> pathlib.Path:
  """Names a file after all that its content depends on but the encoders."""
  try:
    stat = video.path.stat()
    age = (stat.st_size, stat.st_mtime_ns)
  except OSError:  # whoever reads it will say so
    age = None
  text = json.dumps([video.key, video.caption, age, settings])
  return keep / f"{hashlib.sha256(text.encode()).hexdigest()}.npz"


def _read_kept(path: pathlib.Path | None) -> _Encoded | None:
  if path is None or not path.exists():
    return None
  with np.load(path) as file:
    return file["latents"], file["embedding"]


def _write_kept(path: pathlib.Path | None, arrays: _Encoded) -> None:
  """Writes all of a file, or nothing."""
  if path is None:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix(f".{os.getpid()}.part")
  with part.open("wb") as file:
    np.savez(file, latents=arrays[0], embedding=arrays[1])
  os.replace(part, path)
