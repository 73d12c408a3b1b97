"""Clips as files, with beside each what it was made of.

`NAME.json` lies beside `NAME.mp4` when the clip is finished, and says which
prompt, seed, schedules, chunks and weights made it: a list of clips goes on
where it was stopped.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from crcm_jax.chunks import ChunkPattern
from crcm_jax.evaluation import video_writer
from crcm_jax.evaluation._video import write_whole
from crcm_jax.generation._generator import Generator, Image

FPS = 16.0
"""Frames a second of every Wan 2.1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
  """One video to make.

  Attributes:
    path: where it goes.
    prompt: what it shows.
    seed: of its noise.
    negative_prompt: what it is guided away from.
    image: the file of its first frame.
  """

  path: pathlib.Path
  prompt: str
  seed: int = 0
  negative_prompt: str = ""
  image: str | None = None

  def record(self, generator: Generator) -> dict[str, Any]:
    """Returns what the clip is made of, as JSON holds it."""
    fields = ("prompt", "negative_prompt", "seed", "image")
    return json.loads(
      json.dumps(
        {
          **{name: getattr(self, name) for name in fields},
          **generator.settings.record(),
          "weights": generator.networks.weights_hash,
        }
      )
    )


class Timing(NamedTuple):
  """How fast a clip was made, encoding included."""

  first: float
  """Seconds to its first frame."""
  steady: float | None
  """Frames a second after the second chunk; None for a shorter clip."""

  def __str__(self) -> str:
    steady = "" if self.steady is None else f", then {self.steady:.1f} frames/s"
    return f"first frame after {self.first:.2f} s{steady}"


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
  """Reads a file of prompts, one a line.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it has no prompt, or a line is empty.
  """
  lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
  empty = [i for i, line in enumerate(lines, 1) if not line.strip()]
  if empty or not lines:
    what = f"line {empty[0]} is empty" if empty else "it is empty"
    raise ValueError(
      f"`prompts` must be a file with one prompt a line; in {str(path)!r}"
      f" {what}. Remove empty lines: clips are numbered by line."
    )
  return [line.strip() for line in lines]


def is_finished(clip: Clip, generator: Generator) -> bool:
  """Says whether a clip is there, made as it would be now.

  Raises:
    ValueError: if it was made otherwise.
  """
  path = _record_path(clip)
  if not (path.exists() and clip.path.exists()):
    return False
  try:
    found = json.loads(path.read_text())
  except ValueError:
    return False  # not one of ours, or half of it
  wanted = clip.record(generator)
  if other := sorted(k for k in wanted if found.get(k) != wanted[k]):
    raise ValueError(
      f"`out` must hold clips of these settings; {str(clip.path)!r} was made"
      f" with other {', '.join(other)}. Choose another folder, or remove it."
    )
  return True


def write_clip(
  clip: Clip,
  generator: Generator,
  text: np.ndarray,
  null: np.ndarray | None,
  *,
  image: Image | None = None,
  fps: float = FPS,
  progress: Callable[[int], Any] = lambda frames: None,
) -> Timing:
  """Makes one clip, writing frames as they come, and its record.

  Args:
    clip: what to make.
    generator: makes it.
    text: embeddings of its prompt, `[1, l, d]`.
    null: of its negative prompt.
    image: its first frame, in [-1, 1].
    fps: frames a second.
    progress: is told how many frames were written.
  """
  _record_path(clip).unlink(missing_ok=True)
  start = time.perf_counter()
  frames = generator(text, null, seed=clip.seed, image=image)
  with video_writer(clip.path, fps=fps) as write:
    marks = list(_written(frames, write, progress))
  record = json.dumps(clip.record(generator), indent=2) + "\n"
  write_whole(_record_path(clip), record.encode())
  return _timing(start, marks, generator.settings.pattern)


def _written(
  frames: Iterator[np.ndarray],
  write: Callable[[np.ndarray], None],
  progress: Callable[[int], Any],
) -> Iterator[tuple[float, int]]:
  """Writes frames, and says when how many of them were there."""
  for piece in frames:
    now = time.perf_counter()
    write(piece)
    progress(len(piece))
    yield now, len(piece)


def _timing(
  start: float,
  marks: Sequence[tuple[float, int]],
  pattern: ChunkPattern | None,
) -> Timing:
  """Leaves out the first two chunks, which may wait for a compiler."""
  first = marks[0][0] - start
  skip = len(marks) if pattern is None else pattern.first + pattern.rest
  if len(marks) <= skip:
    return Timing(first, None)
  frames = sum(count for _, count in marks[skip:])
  return Timing(first, frames / (marks[-1][0] - marks[skip - 1][0]))


def _record_path(clip: Clip) -> pathlib.Path:
  return clip.path.with_suffix(".json")
