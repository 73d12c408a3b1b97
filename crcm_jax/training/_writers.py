"""Where a run's numbers and pictures go.

`Files` writes one JSON object per line to `metrics.jsonl` and one gif per clip
to `samples/`; `TensorBoard` writes the same for TensorBoard. Several writers
are one `Writer` through `Fanout`. Numbers are of three kinds, each in a file of
its own: a run's metrics, which a resumed run repeats exactly, its speed, which
it does not, and what the sample videos' pixels are like.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import (
  Any,
  get_args,
  Literal,
  Protocol,
  runtime_checkable,
  TypeAlias,
)

import numpy as np

from crcm_jax import _extras
from crcm_jax.evaluation import write_video

Kind: TypeAlias = Literal["metrics", "speed", "samples"]
"""What numbers are about; also the file's name."""


@runtime_checkable
class Writer(Protocol):
  """Takes what a run reports of a step."""

  def scalars(
    self, step: int, values: Mapping[str, float], kind: Kind = "metrics"
  ) -> None:
    """Writes numbers by name."""
    ...

  def videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
    """Writes clips by name, each `[f, h, w, c]` in [-1, 1]."""
    ...

  def close(self) -> None:
    """Writes what is still in memory."""
    ...


class Fanout:
  """Hands everything on to several writers."""

  def __init__(self, writers: Sequence[Writer]):
    self._writers = tuple(writers)

  def scalars(
    self, step: int, values: Mapping[str, float], kind: Kind = "metrics"
  ) -> None:
    """Writes numbers to each writer."""
    for writer in self._writers:
      writer.scalars(step, values, kind)

  def videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
    """Writes clips to each writer."""
    for writer in self._writers:
      writer.videos(step, videos)

  def close(self) -> None:
    """Closes each writer."""
    for writer in self._writers:
      writer.close()


class Files:
  """`KIND.jsonl` and `samples/NAME_STEP.gif` in a folder."""

  def __init__(self, folder: pathlib.Path | str, *, from_step: int = 0):
    """Opens the files for appending.

    Args:
      folder: where the files go; made if it is missing.
      from_step: the step that the run goes on from. Lines of later steps,
        which a run wrote that stopped after its last checkpoint, go away, so
        that a resumed run leaves the same file as one that never stopped.
    """
    self._folder = pathlib.Path(folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    self._files = {}
    for kind in get_args(Kind):
      path = self._folder / f"{kind}.jsonl"
      kept = [r for r in read_metrics(path) if r["step"] <= from_step]
      new = path.with_suffix(".new")  # a killed process leaves one or the other
      new.write_text("".join(json.dumps(r) + "\n" for r in kept))
      new.rename(path)
      self._files[kind] = path.open("a")

  def scalars(
    self, step: int, values: Mapping[str, float], kind: Kind = "metrics"
  ) -> None:
    """Appends one line.

    Raises:
      OSError: if it cannot be written, naming the file.
    """
    file = self._files[kind]
    with _naming(file.name):
      file.write(json.dumps({"step": step, **values}) + "\n")
      file.flush()

  def videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
    """Writes one gif a clip."""
    folder = self._folder / "samples"
    folder.mkdir(exist_ok=True)
    for name, video in videos.items():
      write_video(folder / f"{name}_{step:07d}.gif", video)

  def close(self) -> None:
    """Closes the files; a line that could not be written was reported."""
    for file in self._files.values():
      with contextlib.suppress(OSError):
        file.close()


def read_metrics(path: pathlib.Path | str) -> list[dict[str, Any]]:
  """Reads numbers of any kind; a last line that is cut short is left out."""
  path = pathlib.Path(path)
  rows = []
  for line in path.read_text().splitlines() if path.exists() else ():
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class TensorBoard:
  """Event files for TensorBoard; a clip is one picture of its frames.

  Events are written at once. The thread of tensorboardX's `SummaryWriter`
  would end unseen on a full disk, and then block all who add events.
  """

  def __init__(self, folder: pathlib.Path | str, *, from_step: int = 0):
    """Opens an event file; `from_step` hides later steps of an earlier run."""
    _extras.require("tensorboardX", extra="video")
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary: Any = summary
    self._proto: Any = event_pb2
    self._path = str(pathlib.Path(folder) / "events")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    self._file = event_file_writer.EventsWriter(self._path)
    log = self._proto.SessionLog
    self._add(from_step + 1, dict(session_log=log(status=log.START)))

  def scalars(
    self, step: int, values: Mapping[str, float], kind: Kind = "metrics"
  ) -> None:
    """Adds one point to each curve.

    Raises:
      OSError: if it cannot be written, naming the files.
    """
    prefix = "" if kind == "metrics" else f"{kind}/"
    points = (
      self._summary.scalar(prefix + name, value)
      for name, value in values.items()
    )
    self._add(step, *(dict(summary=point) for point in points))

  def videos(self, step: int, videos: Mapping[str, np.ndarray]) -> None:
    """Adds each clip as a strip: its frames side by side, in time's order."""
    for name, video in videos.items():
      strip = np.concatenate(list(video), axis=1)  # [h, f*w, c]
      picture = (np.clip(strip, -1, 1) + 1) / 2
      image = self._summary.image(name, picture, dataformats="HWC")
      self._add(step, dict(summary=image))

  def close(self) -> None:
    """Closes the file; an event that could not be written was reported."""
    with contextlib.suppress(OSError):
      self._file.close()

  def _add(self, step: int, *events: Mapping[str, Any]) -> None:
    with _naming(f"{self._path}.out.tfevents.*"):
      for event in events:
        self._file.write_event(
          self._proto.Event(wall_time=time.time(), step=step, **event)
        )
      self._file.flush()


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
  """Tells which file could not be written."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror, path) from error
