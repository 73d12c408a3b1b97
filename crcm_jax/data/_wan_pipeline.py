"""Prepared latents: written once, then batches by TFDS and Grain."""

import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from crcm_jax._extras import require
from crcm_jax.data import _pipeline, _reading
from crcm_jax.data._batch import Batch
from crcm_jax.data._records import BadRecord, LatentExample

_VERSION = "1.0.0"


class WanLatentsInfo(NamedTuple):
  """What a prepared dataset holds."""

  examples: int
  latents: tuple[int, int, int, int]
  """Shape of a video's latents, [f, h, w, c]."""
  embedding: tuple[int, int]
  """Shape of a caption's embeddings, [l, d]."""
  skipped: dict[str, str]
  """Names of the records that were left out, and why."""


def prepare_wan_latents(
  data_dir: str | os.PathLike[str],
  name: str,
  records: Iterable[LatentExample | BadRecord],
  *,
  null_embedding: Float[np.ndarray, "l d"],
  max_bad: int = 10,
  dtype: str = "float16",
) -> pathlib.Path:
  """Writes a dataset `wan_latents` of records, all of it or nothing.

  The first whole record sets the shapes that all must have.

  Args:
    data_dir: the folder for TFDS datasets.
    name: of this one, such as "pets-480p".
    records: from `read_latent_shards` or `encode_videos`, or your own.
    null_embedding: embeddings of the empty or the negative prompt, which stand
      in for a dropped caption.
    max_bad: bad records to skip; one more is an error that names them all.
    dtype: to store numbers in, "float16" or "float32".

  Returns:
    The dataset's folder, for `wan_latents_batches`.

  Raises:
    ImportError: if the extra `data` is missing.
    FileExistsError: if there is a dataset of that name.
    ValueError: if too many records are bad, none is whole, or an argument is
      out of range.
  """
  require("tensorflow_datasets", extra="data")
  from crcm_jax.data import wan_latents

  folder = check_wan_latents_name(data_dir, name)
  if dtype not in ("float16", "float32"):
    raise ValueError(f"`dtype` must be float16 or float32; got {dtype!r}.")
  records, first = _peek(records, max_bad)
  if null_embedding.shape != first.embedding.shape:
    raise ValueError(
      "`null_embedding` must have the shape of the captions' embeddings,"
      f" {first.embedding.shape}; got {null_embedding.shape}."
    )
  wan_latents.prepare(
    data_dir,
    name,
    latents=first.latents.shape,
    embedding=first.embedding.shape,
    dtype=dtype,
    max_bad=max_bad,
    records=records,
    null_embedding=np.asarray(null_embedding, np.float32),
  )
  return folder


def check_wan_latents_name(
  data_dir: str | os.PathLike[str], name: str
) -> pathlib.Path:
  """Returns the folder that a dataset will have.

  Raises:
    FileExistsError: if there is a dataset of that name.
    ValueError: if `name` cannot be the name of a folder.
  """
  if not re.fullmatch(r"\w[\w.-]*", name):
    raise ValueError(
      f"`name` must consist of letters, digits, '_', '-' and '.'; got {name!r}."
    )
  folder = pathlib.Path(data_dir, "wan_latents", name, _VERSION)
  if folder.exists():
    raise FileExistsError(
      f"`name` must be new; {folder} exists. Remove it or choose another name."
    )
  return folder


def _peek(
  records: Iterable[LatentExample | BadRecord], max_bad: int
) -> tuple[Iterable[LatentExample | BadRecord], LatentExample]:
  """Returns the records again, and the first whole one."""
  source, seen = iter(records), []
  for record in source:
    seen.append(record)
    if isinstance(record, LatentExample):
      return itertools.chain(seen, source), record
    if len(seen) > max_bad:
      break
  reasons = "; ".join(f"{bad.key} {bad.reason}" for bad in seen)
  raise ValueError(
    "`records` must hold whole ones; "
    + (f"the first {len(seen)} are bad: {reasons}." if seen else "got none.")
  )


def describe_wan_latents(folder: str | os.PathLike[str]) -> WanLatentsInfo:
  """Says what a prepared dataset holds.

  Args:
    folder: what `prepare_wan_latents` returned.

  Returns:
    Its size, its shapes, and what was left out.

  Raises:
    FileNotFoundError: if there is no dataset.
  """
  info = _open(folder).info
  length, width = info.metadata["text_length"], info.features["embedding"].shape
  return WanLatentsInfo(
    info.splits["train"].num_examples,
    tuple(info.features["latents"].shape),
    (length, width[1]),
    dict(info.metadata["skipped"]),
  )


def wan_latents_batches(
  folder: str | os.PathLike[str],
  *,
  batch_size: int,
  frames: int | None = None,
  seed: int = 0,
  shuffle: bool = True,
  epochs: int | None = None,
  reading: _reading.Reading | None = None,
  rows: Sequence[int] | None = None,
) -> _reading.Batches:
  """Iterates over batches of a prepared dataset, for training.

  The batches are the same, in the same order, however many processes read
  their rows. What is left of the last epoch and fills no batch is left out.

  Args:
    folder: what `prepare_wan_latents` returned.
    batch_size: videos in a batch of all processes together.
    frames: the first so many latent frames of each; None is for all.
    seed: of the shuffle; every epoch has another order.
    shuffle: False keeps the order of the files.
    epochs: how often each video is read; None is for ever.
    reading: worker processes, and how many bad records to skip.
    rows: of each batch, the examples that this process reads, such as (2, 3)
      for the second of two processes; None for all. `sharding.local_rows`
      names those of its devices.

  Returns:
    An iterator of float32 NumPy arrays.

  Raises:
    ImportError: if the extra `data` is missing.
    FileNotFoundError: if there is no dataset.
    ValueError: if `rows` are not of the batch, there are too few videos for a
      batch, or they are shorter than `frames`.
  """
  rows = _pipeline.check_rows(batch_size, rows)
  info = describe_wan_latents(folder)
  frames = info.latents[0] if frames is None else frames
  if not 1 <= frames <= info.latents[0]:
    raise ValueError(
      f"`frames` must lie in [1, {info.latents[0]}], the length of the prepared"
      f" latents; got {frames}."
    )
  reading = reading or _reading.Reading()
  null = np.load(_null_file(folder))
  videos = _reading.Examples(
    _reading.Records(folder, "train"),
    functools.partial(_example, null=null, frames=frames),
    [(frames, *info.latents[1:]), info.embedding, info.embedding],
    reading.max_bad,
  )
  return _pipeline.batches(
    require("grain", extra="data").MapDataset.source(videos),
    reading=reading,
    batch_size=batch_size,
    seed=seed,
    shuffle=shuffle,
    epochs=epochs,
    rows=rows,
  )


def _example(record: dict[str, Any], null: np.ndarray, frames: int) -> Batch:
  embedding = np.zeros(null.shape, np.float32)
  embedding[: len(record["embedding"])] = record["embedding"]
  return Batch(record["latents"][:frames].astype(np.float32), embedding, null)


def _open(folder: str | os.PathLike[str]) -> Any:
  tfds = require("tensorflow_datasets", extra="data")
  if not _null_file(folder).is_file():
    raise FileNotFoundError(
      "`folder` must be a prepared dataset, .../wan_latents/NAME/1.0.0;"
      f" {os.fspath(folder)} is not. Prepare one with `crcm encode`."
    )
  return tfds.builder_from_directory(os.fspath(folder))


def _null_file(folder: str | os.PathLike[str]) -> pathlib.Path:
  return pathlib.Path(folder, "null_embedding.npy")
