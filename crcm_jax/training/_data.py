"""The data that a config can name.

Each choice is a frozen record of settings that makes batches to train on and
labelled held-out clips to evaluate on, and maps captions and latents.
"""

import contextlib
import dataclasses
import fcntl
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import data

_READING = data.Reading()


@runtime_checkable
class Dataset(Protocol):
  """What the training loop needs of a dataset."""

  def batches(
    self, folder: pathlib.Path, seed: int, rows: Sequence[int] | None = None
  ) -> data.BatchIterator:
    """Returns batches for ever, in an order set by `seed`.

    Args:
      folder: holds the datasets.
      seed: of the order.
      rows: of each batch, the examples that this process reads; None for all.
    """
    ...

  def shapes(self) -> Any:
    """Returns the shapes and dtypes of a batch of all processes."""
    ...

  def clips(
    self, folder: pathlib.Path, batch_size: int
  ) -> Iterator[data.LabelledBatch]:
    """Returns the held-out clips, once, with captions and labels."""
    ...

  def decode(self, latents: Any) -> Any:
    """Returns pixels in [-1, 1], `[b f h w c]` with c 1 or 3."""
    ...

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Returns the conditions of captions."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingDigits:
  """The dataset `moving_digits`; see `data.prepare_moving_digits`.

  Attributes:
    batch_size: clips in a batch of all processes together.
    frames: the first so many of each clip.
    train_clips: clips to train on.
    test_clips: clips to evaluate on.
    seed: of the clips; the run's seed shuffles them.
    in_memory: whether to read all clips first; feeds a GPU faster.
    reading: worker processes, and how many bad records to skip; a config gives
      them in its section `loop`.
  """

  batch_size: int
  frames: int
  train_clips: int = 8192
  test_clips: int = 1024
  seed: int = 0
  in_memory: bool = False
  reading: data.Reading = _READING

  def batches(
    self, folder: pathlib.Path, seed: int, rows: Sequence[int] | None = None
  ) -> data.BatchIterator:
    """Returns rows of the batches, for ever, in an order set by `seed`."""
    return data.moving_digits_batches(
      self._builder(folder),
      split="train",
      batch_size=self.batch_size,
      frames=self.frames,
      seed=seed,
      in_memory=self.in_memory,
      reading=self.reading,
      rows=rows,
    )

  def clips(
    self, folder: pathlib.Path, batch_size: int
  ) -> Iterator[data.LabelledBatch]:
    """Returns the held-out clips, once, with captions and labels."""
    return data.labelled_moving_digits(
      self._builder(folder),
      split="test",
      batch_size=batch_size,
      frames=self.frames,
    )

  def decode(self, latents: Any) -> Any:
    """Returns pixels in [-1, 1]."""
    return data.video_from_latents(latents)

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Returns the embeddings of captions."""
    return data.encode_captions(captions)

  def shapes(self) -> Any:
    """Returns the shapes and dtypes of a batch of all processes."""
    size = data.CANVAS // 4
    return _shapes(
      (self.batch_size, self.frames, size, size, 16),
      (self.batch_size, data.TEXT_LENGTH, data.TEXT_WIDTH),
    )

  def _builder(self, folder: pathlib.Path) -> Any:
    """Builds the dataset once, also if several stages start together."""
    with _locked(folder):
      return data.prepare_moving_digits(
        folder,
        train_clips=self.train_clips,
        test_clips=self.test_clips,
        seed=self.seed,
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLatents:
  """Noise of the size of a real video, to measure speed and memory with.

  Attributes:
    batch_size: videos in a batch of all processes together.
    frames: latent frames of a video.
    height: rows of a latent frame.
    width: columns of a latent frame.
    channels: channels of a latent.
    text_length: text embeddings a prompt.
    text_width: width of one embedding.
  """

  batch_size: int
  frames: int
  height: int
  width: int
  channels: int = 16
  text_length: int = 512
  text_width: int = 4096

  def batches(
    self, folder: pathlib.Path, seed: int, rows: Sequence[int] | None = None
  ) -> data.BatchIterator:
    """Returns the same batches every time: each row has a seed of its own."""
    del folder
    shapes = [a.shape[1:] for a in self.shapes()]
    return _Noise(
      shapes, seed, range(self.batch_size) if rows is None else rows
    )

  def clips(
    self, folder: pathlib.Path, batch_size: int
  ) -> Iterator[data.LabelledBatch]:
    """Raises: noise has no captions to be scored against."""
    raise ValueError(_NO_CAPTIONS)

  def decode(self, latents: Any) -> Any:
    """Shows the first channel of the latents."""
    return latents[..., :1]

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Raises: noise has no captions."""
    raise ValueError(_NO_CAPTIONS)

  def shapes(self) -> Any:
    """Returns the shapes and dtypes of a batch of all processes."""
    frame = (self.height, self.width, self.channels)
    return _shapes(
      (self.batch_size, self.frames, *frame),
      (self.batch_size, self.text_length, self.text_width),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanLatents:
  """A dataset of latents that `crcm encode` prepared.

  Attributes:
    folder: of the dataset, .../wan_latents/NAME/1.0.0.
    batch_size: videos in a batch of all processes together.
    frames: the first so many latent frames of each; None is for all.
    reading: as `MovingDigits` has it.
  """

  folder: str
  batch_size: int
  frames: int | None = None
  reading: data.Reading = _READING

  def batches(
    self, folder: pathlib.Path, seed: int, rows: Sequence[int] | None = None
  ) -> data.BatchIterator:
    """Returns rows of the batches, for ever, in an order set by `seed`."""
    del folder
    return data.wan_latents_batches(
      self.folder,
      batch_size=self.batch_size,
      frames=self.frames,
      seed=seed,
      reading=self.reading,
      rows=rows,
    )

  def clips(
    self, folder: pathlib.Path, batch_size: int
  ) -> Iterator[data.LabelledBatch]:
    """Raises: no labels to be scored against."""
    raise ValueError(
      "`config.data.name` must be a dataset with held-out labelled clips to be"
      " evaluated; `wan_latents` has none. Score its videos with VBench:"
      " docs/evaluation.md."
    )

  def decode(self, latents: Any) -> Any:
    """Shows the first channel of the latents; the autoencoder is not here."""
    return latents[..., :1]

  def encode(self, captions: Sequence[str]) -> np.ndarray:
    """Raises: the text encoder is not here."""
    raise ValueError(
      "`wan_latents` holds embeddings of its own captions and cannot embed"
      " others; `crcm sample --weights` can."
    )

  def shapes(self) -> Any:
    """Returns the shapes and dtypes of a batch of all processes."""
    info = data.describe_wan_latents(self.folder)
    video = (self.frames or info.latents[0], *info.latents[1:])
    return _shapes(
      (self.batch_size, *video), (self.batch_size, *info.embedding)
    )


_NO_CAPTIONS = (
  "`config.data.name` must be a dataset with captions; `random_latents` is"
  " noise, to measure speed and memory with."
)


class _Noise:
  """Batches whose position is their number."""

  def __init__(
    self, shapes: Sequence[tuple[int, ...]], seed: int, rows: Sequence[int]
  ):
    self._shapes, self._seed, self._rows = shapes, seed, rows
    self._position = 0

  def __iter__(self) -> Iterator[data.Batch]:
    return self

  def __next__(self) -> data.Batch:
    rows = [self._row(row) for row in self._rows]
    self._position += 1
    arrays: Any = map(np.stack, zip(*rows, strict=True))
    return data.Batch(*arrays)

  def _row(self, row: int) -> list[np.ndarray]:
    rng = np.random.default_rng((self._seed, self._position, row))
    return [rng.standard_normal(s, np.float32) for s in self._shapes]

  def get_state(self) -> dict[str, Any]:
    return {"position": self._position}

  def set_state(self, state: dict[str, Any], /) -> None:
    self._position = state["position"]


DATASETS = {
  "moving_digits": MovingDigits,
  "random_latents": RandomLatents,
  "wan_latents": WanLatents,
}
"""The datasets by the names that configs give them."""


def _shapes(video: tuple[int, ...], text: tuple[int, ...]) -> Any:
  arrays: Any = (
    jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (video, text, text)
  )
  return data.Batch(*arrays)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  """Lets one process of this machine in at a time."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / ".lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
