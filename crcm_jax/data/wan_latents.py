"""The TFDS builder `wan_latents`; importing this module registers it.

It writes records of latents and text embeddings, from wherever they come, as
ArrayRecord files; no TensorFlow. Broken records are named, counted and left
out. Embeddings are stored without the zeros at their end.
"""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from crcm_jax._extras import require
from crcm_jax.data._records import BadRecord, LatentExample

tfds: Any = require("tensorflow_datasets", extra="data")

NULL_FILE = "null_embedding.npy"
"""Beside the records: what stands in for a dropped caption."""

_LOG = logging.getLogger("crcm_jax")

_DESCRIPTION = """
Videos as latents of Wan's autoencoder, with captions and their embeddings.
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class WanLatentsConfig(tfds.core.BuilderConfig):
  """What is prepared.

  Attributes:
    latents: shape of every video's latents, [f, h, w, c].
    embedding: shape of every caption's embeddings, [l, d].
    dtype: to store numbers in.
    max_bad: bad records to skip before giving up.
    records: the `LatentExample`s and `BadRecord`s.
    null_embedding: what stands in for a dropped caption.
  """

  latents: tuple[int, ...]
  embedding: tuple[int, ...]
  dtype: str
  max_bad: int
  records: Iterable[LatentExample | BadRecord] = dataclasses.field(repr=False)
  null_embedding: np.ndarray = dataclasses.field(repr=False)


class WanLatents(tfds.core.GeneratorBasedBuilder):
  """Builds `wan_latents`, one folder for each name."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012

  def _info(self):
    config, raw = self.builder_config, tfds.features.Encoding.BYTES
    dtype, width = np.dtype(config.dtype), config.embedding[1]
    tensor = lambda shape: tfds.features.Tensor(
      shape=shape, dtype=dtype, encoding=raw
    )
    features = {
      "latents": tensor(config.latents),
      "embedding": tensor((None, width)),
      "caption": tfds.features.Text(),
    }
    about = {"text_length": config.embedding[0], "skipped": {}}
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(features),
      metadata=tfds.core.MetadataDict(about),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    config, skipped = self.builder_config, self.info.metadata["skipped"]
    np.save(pathlib.Path(self.data_dir, NULL_FILE), config.null_embedding)
    seen: set[str] = set()
    for record in config.records:
      problem = _problem(record, config, seen)
      if problem is None:
        seen.add(record.key)
        yield record.key, _as_stored(record, config.dtype)
      else:
        _skip(record.key, problem, skipped, config.max_bad)
    if not seen:
      raise ValueError(
        f"`records` must hold a usable one; got none. Skipped: {skipped}."
      )


def _problem(
  record: LatentExample | BadRecord, config: WanLatentsConfig, seen: set[str]
) -> str | None:
  """Says what is wrong with a record; None if nothing is."""
  if isinstance(record, BadRecord):
    return record.reason
  if record.key in seen:
    return "has the name of an earlier one"
  for name in ("latents", "embedding"):
    array, shape = getattr(record, name), getattr(config, name)
    if array.shape != shape:
      return f"must have {name} of shape {shape}; it has {array.shape}"
    with np.errstate(over="ignore"):
      stored = array.astype(config.dtype)
    if not np.isfinite(stored).all():
      return f"has {name} that are not finite in {config.dtype}"
  return None


def _skip(
  key: str, problem: str, skipped: dict[str, str], max_bad: int
) -> None:
  if key in skipped:  # several records of one name
    key = f"{key} ({len(skipped)})"
  skipped[key] = problem.rstrip(".")
  _LOG.warning("Skipped: %s %s", key, skipped[key])
  if len(skipped) > max_bad:
    raise ValueError(
      f"`max_bad` must allow for the bad records; it is {max_bad}, and there"
      f" are at least {len(skipped)}: "
      + "; ".join(f"{name} {why}" for name, why in skipped.items())
      + ". Repair them, or raise it."
    )


def _as_stored(record: LatentExample, dtype: str) -> dict[str, Any]:
  used = np.flatnonzero(record.embedding.any(axis=-1))
  stop = used[-1] + 1 if len(used) else 0
  return {
    "latents": record.latents.astype(dtype),
    "embedding": record.embedding[:stop].astype(dtype),
    "caption": record.caption,
  }


def prepare(
  data_dir: str | os.PathLike[str], name: str, **settings: Any
) -> WanLatents:
  """Writes a dataset under `data_dir`; all of it, or nothing.

  Args:
    data_dir: the folder for TFDS datasets.
    name: of the dataset's folder.
    **settings: fields of `WanLatentsConfig`.

  Returns:
    The builder, ready for `as_data_source`.
  """
  config = WanLatentsConfig(name=name, **settings)
  builder = WanLatents(
    data_dir=os.fspath(data_dir), config=config, file_format="array_record"
  )
  download = tfds.download.DownloadConfig(try_download_gcs=False)
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_config=download)
  return builder
