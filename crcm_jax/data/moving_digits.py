"""The TFDS builder `moving_digits`; importing this module registers it.

No TensorFlow: clips are written as ArrayRecord files and read by
`builder.as_data_source(split)`. What a clip holds is in `_clips.py`.
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from crcm_jax._extras import require
from crcm_jax.data import _clips

tfds: Any = require("tensorflow_datasets", extra="data")

_DESCRIPTION = """
Real handwritten digits (8 x 8 scans, drawn 14 pixels large) that move, bounce
and cross on a 32 x 32 canvas, one or two in a clip, with a caption and the
digits, positions and velocities of each frame. Train and test share no scan.
"""

_CITATION = """
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  publisher = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}
"""


@dataclasses.dataclass(eq=False, kw_only=True)
class MovingDigitsConfig(tfds.core.BuilderConfig):
  """Settings of the dataset; `name` is derived from those that are not usual.

  Attributes:
    name: of the folder that holds the files.
    channels: 1 for grey, 3 for coloured digits.
    frames: in each clip.
    train_clips: how many.
    test_clips: how many.
    seed: of all draws.
  """

  name: str = ""
  channels: int = 1
  frames: int = _clips.CLIP_FRAMES
  train_clips: int = 8192
  test_clips: int = 1024
  seed: int = 0

  def __post_init__(self):
    for setting in ("frames", "train_clips", "test_clips"):
      if getattr(self, setting) < 1:
        raise ValueError(
          f"`{setting}` must be at least 1; got {getattr(self, setting)}."
        )
    if self.channels not in (1, 3):
      raise ValueError(
        f"`channels` must be 1 (grey) or 3 (RGB); got {self.channels}."
      )
    self.name = self.name or _config_name(self)


def _config_name(config: MovingDigitsConfig) -> str:
  """Returns "grey" or "rgb", then every setting that is not the default."""
  parts = ["grey" if config.channels == 1 else "rgb"]
  for setting in ("frames", "train_clips", "test_clips", "seed"):
    value = getattr(config, setting)
    if value != getattr(MovingDigitsConfig, setting):
      parts.append(f"{setting}-{value}")
  return ".".join(parts)


class MovingDigits(tfds.core.GeneratorBasedBuilder):
  """Builds `moving_digits`: deterministic, about a millisecond a clip."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    MovingDigitsConfig(description="Grey clips."),
    MovingDigitsConfig(channels=3, description="Coloured digits on black."),
  ]

  def _info(self):
    config = self.builder_config
    f, k = config.frames, _clips.MAX_DIGITS
    shape = (f, _clips.CANVAS, _clips.CANVAS, config.channels)
    raw = tfds.features.Encoding.BYTES
    features = {
      "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding=raw),
      "caption": tfds.features.Text(),
      "digits": tfds.features.Tensor(shape=(k,), dtype=np.int32),
      "scans": tfds.features.Tensor(shape=(k,), dtype=np.int32),
      "positions": tfds.features.Tensor(shape=(f, k, 2), dtype=np.float32),
      "velocities": tfds.features.Tensor(shape=(f, k, 2), dtype=np.float32),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(features),
      citation=_CITATION,
      license="Digits: CC BY 4.0; see NOTICE.",
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # the scans come with scikit-learn
    return {
      split: self._generate_examples(split) for split in ("train", "test")
    }

  def _generate_examples(self, split) -> Iterator[tuple[int, dict[str, Any]]]:
    config = self.builder_config
    for index in range(getattr(config, f"{split}_clips")):
      clip = _clips.make_clip(
        index,
        split=split,
        seed=config.seed,
        frames=config.frames,
        channels=config.channels,
      )
      labels = clip.labels._asdict()
      yield index, dict(video=clip.video, caption=clip.caption, **labels)


def prepare(data_dir: str | os.PathLike[str], **settings: Any) -> MovingDigits:
  """Writes the dataset under `data_dir`, unless it is there already.

  Args:
    data_dir: the folder for TFDS datasets.
    **settings: fields of `MovingDigitsConfig`.

  Returns:
    The builder, ready for `as_data_source`.
  """
  config = MovingDigitsConfig(**settings)
  builder = MovingDigits(
    data_dir=os.fspath(data_dir),
    config=MovingDigits.builder_configs.get(config.name, config),
    file_format="array_record",
  )
  # Without this TFDS would look for a ready-made copy on the network.
  download = tfds.download.DownloadConfig(try_download_gcs=False)
  # TFDS announces a download of unknown size, but nothing is downloaded, and
  # its progress bars would break those of the run that waits.
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_config=download)
  return builder
