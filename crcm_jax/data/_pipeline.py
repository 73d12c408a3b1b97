"""Batches of moving digits: TFDS random access, then Grain.

  clips -> latents, text -> shuffle -> epochs -> this process's rows -> batches

Grain indexes every step of this chain, so an iterator's position is one
number: `get_state()` and `set_state(state)` resume exactly.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args, NamedTuple

import numpy as np

from crcm_jax._extras import require
from crcm_jax.data import _clips, _latents, _reading, _text
from crcm_jax.data._batch import Batch
from crcm_jax.data._clips import Labels, Split


class LabelledBatch(NamedTuple):
  """A batch with what is known about its clips, for evaluation."""

  batch: Batch
  captions: tuple[str, ...]
  """One for each clip."""
  labels: Labels
  """NumPy arrays with leading axis b."""


def prepare_moving_digits(
  data_dir: str | os.PathLike[str], **settings: Any
) -> Any:
  """Writes the dataset `moving_digits` under `data_dir`, once.

  Takes about ten seconds on one core and 45 MB for the usual 8,192 + 1,024
  clips. Where several processes share a folder, one of them prepares first.

  Args:
    data_dir: the folder for TFDS datasets.
    **settings: `channels` (1 grey, 3 RGB), `frames`, `train_clips`,
      `test_clips`, `seed`. Each choice lies in a folder of its own.

  Returns:
    The TFDS builder: `builder.as_data_source("train")` reads single clips.

  Raises:
    ImportError: if the extra `data` is missing.
    ValueError: if a setting is out of range.
  """
  require("tensorflow_datasets", extra="data")
  from crcm_jax.data import moving_digits

  return moving_digits.prepare(data_dir, **settings)


def moving_digits_batches(
  builder: Any,
  *,
  split: Split,
  batch_size: int,
  frames: int,
  seed: int = 0,
  shuffle: bool = True,
  epochs: int | None = None,
  in_memory: bool = False,
  reading: _reading.Reading | None = None,
  rows: Sequence[int] | None = None,
) -> _reading.Batches:
  """Iterates over batches of latents and caption embeddings, for training.

  The batches are the same, in the same order, however many processes read
  their rows. What is left of the last epoch and fills no batch is left out.

  Args:
    builder: what `prepare_moving_digits` returned.
    split: "train" or "test".
    batch_size: clips in a batch of all processes together.
    frames: the first so many of each clip: captions tell how it starts.
    seed: of the shuffle; every epoch has another order.
    shuffle: False keeps the order of the files.
    epochs: how often each clip is read; None is for ever.
    in_memory: whether to read and encode all clips first (300 MB for 8,192 of
      9 frames, a few seconds), which then feeds an accelerator several times
      faster. The batches are the same.
    reading: worker processes, and how many bad records to skip.
    rows: of each batch, the examples that this process reads, such as (2, 3)
      for the second of two processes; None for all. `sharding.local_rows`
      names those of its devices.

  Returns:
    An iterator of float32 NumPy arrays: `x_0`
    `[len(rows), frames, 8, 8, 16]`, `condition` and `null_condition`
    `[len(rows), 8, 32]`.

  Raises:
    ImportError: if the extra `data` is missing.
    ValueError: if `rows` are not of the batch, there are too few clips for a
      batch, or the clips have fewer than `frames` frames.
  """
  rows = check_rows(batch_size, rows)
  _check_clips(builder, split, frames)
  reading = reading or _reading.Reading()
  clips: Any = _reading.Examples(
    _reading.Records(builder.data_dir, split),
    functools.partial(_encode, frames=frames),
    _shapes(builder, frames),
    reading.max_bad,
  )
  if in_memory:
    clips = [clips[i] for i in range(len(clips))]
  return batches(
    require("grain", extra="data").MapDataset.source(clips),
    reading=reading,
    batch_size=batch_size,
    seed=seed,
    shuffle=shuffle,
    epochs=epochs,
    rows=rows,
  )


def batches(
  examples: Any,
  *,
  reading: _reading.Reading,
  batch_size: int,
  seed: int,
  shuffle: bool,
  epochs: int | None,
  rows: Sequence[int],
) -> _reading.Batches:
  """Iterates over rows of the batches of a Grain dataset of `Read` examples."""
  if shuffle:
    examples = examples.shuffle(seed=seed)
  stream = examples.repeat(epochs)
  _check_enough(stream, batch_size)
  grain = require("grain", extra="data")
  share = grain.MapDataset.source(_Rows(stream, batch_size, rows))
  return _reading.Batches(_batched(share, len(rows), _reading.stack), reading)


class _Rows:
  """Some rows of each batch of a stream, one after the other."""

  def __init__(self, stream: Any, batch_size: int, rows: Sequence[int]):
    self._stream, self._batch_size, self._rows = stream, batch_size, rows

  def __len__(self) -> int:
    return len(self._stream) // self._batch_size * len(self._rows)

  def __getitem__(self, index: int) -> Any:
    batch, row = divmod(index, len(self._rows))
    return self._stream[batch * self._batch_size + self._rows[row]]


def labelled_moving_digits(
  builder: Any, *, split: Split = "test", batch_size: int, frames: int
) -> Iterator[LabelledBatch]:
  """Iterates once over a split, in a fixed order, for evaluation.

  Args:
    builder: what `prepare_moving_digits` returned.
    split: "train" or "test".
    batch_size: clips in a batch; a smaller last batch is dropped.
    frames: the first so many of each clip.

  Returns:
    An iterator of `LabelledBatch`.

  Raises:
    ImportError: if the extra `data` is missing.
    ValueError: as `moving_digits_batches`.
  """
  _check_clips(builder, split, frames)
  grain = require("grain", extra="data")
  clips = grain.MapDataset.source(_reading.Records(builder.data_dir, split))
  _check_enough(clips, batch_size)
  make = functools.partial(_labelled_batch, frames=frames)
  return iter(_reading.read_ahead(_batched(clips, batch_size, make)))


def check_rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
  """Returns the rows to read, all for None; raises if they are not there."""
  if batch_size < 1:
    raise ValueError(
      "`batch_size` must be at least 1, for it counts the clips of all"
      f" processes together; got {batch_size}."
    )
  rows = range(batch_size) if rows is None else rows
  if not rows or min(rows) < 0 or max(rows) >= batch_size:
    raise ValueError(
      f"`rows` must lie in [0, {batch_size}), `batch_size` being {batch_size},"
      f" and be at least one; got {list(rows)}. Pass"
      " `sharding.local_rows(mesh, batch_size)`."
    )
  return rows


def _check_clips(builder: Any, split: str, frames: int) -> None:
  """Raises a ValueError if there are no such clips."""
  if split not in get_args(Split):
    raise ValueError(
      f"`split` must be one of {get_args(Split)}; got {split!r}."
    )
  available = builder.info.features["video"].shape[0]
  if not 1 <= frames <= available:
    raise ValueError(
      f"`frames` must lie in [1, {available}], the length of the prepared"
      f" clips; got {frames}. Longer clips come from"
      f" `prepare_moving_digits(data_dir, frames={max(frames, 1)})`."
    )


def _shapes(builder: Any, frames: int) -> list[tuple[int, ...]]:
  """Returns the shapes of an example's arrays."""
  *_, channels = builder.info.features["video"].shape
  size, text = _clips.CANVAS // 4, (_text.TEXT_LENGTH, _text.TEXT_WIDTH)
  return [(frames, size, size, 16 * channels), text, text]


def _batched(
  clips: Any, batch_size: int, make: Callable[[Sequence[Any]], Any]
) -> Any:
  """Returns a Grain dataset of whole batches."""
  return clips.batch(batch_size, drop_remainder=True, batch_fn=make)


def _check_enough(clips: Any, batch_size: int) -> None:
  if len(clips) < batch_size:
    raise ValueError(
      f"`batch_size` must be at most the {len(clips)} clips that there are; got"
      f" {batch_size}. Prepare more clips."
    )


def _encode(clip: dict[str, Any], frames: int) -> Batch:
  """Returns a clip's latents and text embeddings, without a batch axis."""
  pixels = clip["video"][:frames].astype(np.float32) / 127.5 - 1
  x_0: Any = _latents.latents_from_video(pixels)
  condition, null_condition = _text.encode_captions(
    [_caption(clip), _text.NULL_CAPTION]
  )
  return Batch(x_0, condition, null_condition)


def _labelled_batch(
  clips: Sequence[dict[str, Any]], frames: int
) -> LabelledBatch:
  timed = ("positions", "velocities")
  fields = (
    np.stack([clip[n][:frames] if n in timed else clip[n] for clip in clips])
    for n in Labels._fields
  )
  reads = [_reading.Read(_encode(clip, frames)) for clip in clips]
  captions = tuple(map(_caption, clips))
  return LabelledBatch(_reading.stack(reads).batch, captions, Labels(*fields))


def _caption(clip: dict[str, Any]) -> str:
  return clip["caption"].decode()  # TFDS gives bytes
