"""Scores samplers beside held-out real clips, and times them.

A sampler is any `sample(key, batch) -> x_0` that returns latents like
`batch.x_0`; how it was trained and how many steps it takes is its own affair.
All samplers are asked for the same captions with the same keys.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from crcm_jax import data
from crcm_jax._typing import Array, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.evaluation import _features, _metrics, _motion, _video
from crcm_jax.evaluation._classifier import Classifier

REAL = "real"
"""Name of the row of held-out real clips, the floor of every score."""

CLIP_COMPONENTS = 16  # + 4 of motion: the dimensions of the Frechet distance
CHUNK_COMPONENTS = 16  # the dimensions of the two distances in the drift
_TIMED_CALLS = 3


@runtime_checkable
class Sampler(Protocol):
  """Generates one clip for each example of a batch."""

  def __call__(self, key: PRNGKeyArray, batch: Any) -> Array:
    """Returns latents shaped like `batch.x_0`, for the batch's conditions."""
    ...


class Metric(NamedTuple):
  """What a column of the results means."""

  name: str
  unit: str
  aim: str
  meaning: str


METRICS: dict[str, Metric] = {
  "frechet": Metric(
    "Fréchet distance",
    "",
    "lower",
    "Distance between the Gaussians fitted to the features of these clips and"
    " of real ones: looks, change over time, and motion.",
  ),
  "digit_accuracy": Metric(
    "Digit accuracy",
    "%",
    "higher",
    "Share of the captioned digits that the classifier sees most clearly.",
  ),
  "motion_error": Metric(
    "Motion error",
    "px/frame",
    "lower",
    "Mean difference between the tracked and the captioned velocity. The floor"
    " holds the tracker's error and the spread of speeds that one word covers.",
  ),
  "diversity": Metric(
    "Diversity",
    "",
    "real",
    "Mean distance between the features of clips whose captions name the same"
    " digits. Below the real value: clips repeat one another.",
  ),
  "drift": Metric(
    "Drift",
    "",
    "zero",
    "Fréchet distance of the last chunk's frames minus that of the first's."
    " Positive: quality is lost over time.",
  ),
  "latency_ms": Metric(
    "Latency",
    "ms/chunk",
    "lower",
    "Wall time of one clip at batch size one, without compilation, divided by"
    " its chunks.",
  ),
  "frames_per_second": Metric(
    "Speed",
    "frames/s",
    "higher",
    "Frames of a clip over the same wall time.",
  ),
}
"""The columns of the results, in order."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
  """What `evaluate` found.

  Attributes:
    rows: for `REAL` and each sampler, its metrics by the keys of `METRICS`; a
      metric that does not apply is absent.
    captions: the captions of the example videos.
    videos: for each row, example clips in the order of `captions`, uint8
      `[examples, f, h, w]`.
    settings: numbers of clips and components, for the record.
  """

  rows: dict[str, dict[str, float]]
  captions: list[str]
  videos: dict[str, np.ndarray]
  settings: dict[str, Any]

  def to_json(self) -> str:
    """Returns rows, captions and settings as JSON; non-finite becomes null."""
    rows = {
      name: {k: v if math.isfinite(v) else None for k, v in row.items()}
      for name, row in self.rows.items()
    }
    record = {
      "rows": rows,
      "captions": self.captions,
      "settings": self.settings,
    }
    return json.dumps(record, indent=2)

  def to_text(self) -> str:
    """Returns the rows as an aligned table for a terminal."""
    used = [k for k in METRICS if any(k in row for row in self.rows.values())]
    table = [["", *used]] + [
      [name, *(f"{row[k]:.4g}" if k in row else "-" for k in used)]
      for name, row in self.rows.items()
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
      "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
      for line in table
    ]
    return "\n".join(lines)


def evaluate(
  samplers: Mapping[str, Sampler],
  clips: Iterable[data.LabelledBatch],
  classifier: Classifier,
  *,
  key: PRNGKeyArray,
  pattern: ChunkPattern,
  decode: Callable[[Any], Any] = data.video_from_latents,
  num_clips: int = 256,
  num_reference: int = 512,
  num_examples: int = 4,
  on_row: Callable[[str, dict[str, float]], None] | None = None,
) -> Results:
  """Scores each sampler, and held-out real clips, against other real clips.

  The first `num_reference` real clips define the feature space and what is
  real. The next `num_clips` give the captions for the samplers, and are
  themselves the row `REAL`.

  Args:
    samplers: `{name: sample}`; the rows, in this order.
    clips: real clips that no training saw, such as the test split; batches of
      equal shape, so that a sampler compiles once.
    classifier: gives each frame's features and digits.
    key: for the samplers; batch i uses `fold_in(key, i)`.
    pattern: says which frames are the first chunk and which the last.
    decode: latents `[b f h w c]` to grey video in [-1, 1], `[b f h w]` or
      `[b f h w 1]`.
    num_clips: clips of each sampler. Frechet distances of n clips in d = 20
      dimensions are biased upwards by about (d + d (d + 1) / 4) (1 / n + 1 / m)
      for m reference clips, 0.73 at the defaults.
    num_reference: real clips to compare with.
    num_examples: videos to keep of each row.
    on_row: called with each finished row, for progress.

  Returns:
    Metrics, example videos and settings.

  Raises:
    ValueError: if `clips` ends early or a sampler returns another shape.
  """
  source = iter(clips)
  reference = _take(source, num_reference, decode)
  prompts = _take(source, num_clips, decode)
  score = _Scorer.fit(classifier, reference.video, pattern)

  rows, videos = {}, {}

  def add(name: str, video: np.ndarray, timing: dict[str, float]) -> None:
    rows[name] = score(video, prompts.captions) | timing
    videos[name] = np.stack([*map(_video.to_uint8, video[:num_examples])])
    if on_row is not None:
      on_row(name, rows[name])

  add(REAL, prompts.video, {})
  for name, sample in samplers.items():
    video = _generate(name, sample, key, prompts, decode)
    add(name, video, _time(sample, key, prompts.batches[0], pattern))

  return Results(
    rows=rows,
    captions=list(prompts.captions[:num_examples]),
    videos=videos,
    settings={
      "num_clips": num_clips,
      "num_reference": num_reference,
      "clip_components": CLIP_COMPONENTS,
      "chunk_components": CHUNK_COMPONENTS,
      "frames": prompts.video.shape[1],
      "chunk_pattern": [pattern.first, pattern.rest],
    },
  )


class _RealClips(NamedTuple):
  """Real clips: whole batches for samplers, and the first n decoded."""

  batches: list[Any]
  captions: list[str]
  video: np.ndarray  # [n, f, h, w]


def _take(
  source: Iterator[data.LabelledBatch], count: int, decode: Callable
) -> _RealClips:
  """Reads batches until they hold `count` clips."""
  batches, captions, videos = [], [], []
  while len(captions) < count:
    try:
      clips = next(source)
    except StopIteration:
      raise ValueError(
        f"`clips` must hold at least {count} more clips; it ended after"
        f" {len(captions)}. Lower `num_clips` and `num_reference`, or let it"
        " repeat."
      ) from None
    batches.append(clips.batch)
    captions += clips.captions
    videos.append(_grey(decode(clips.batch.x_0)))
  return _RealClips(batches, captions[:count], np.concatenate(videos)[:count])


def _generate(
  name: str,
  sample: Sampler,
  key: PRNGKeyArray,
  prompts: _RealClips,
  decode: Callable,
) -> np.ndarray:
  """Samples one clip for each caption: [n, f, h, w]."""
  videos = []
  for i, batch in enumerate(prompts.batches):
    x_0 = sample(jax.random.fold_in(key, i), batch)
    if x_0.shape != batch.x_0.shape:
      raise ValueError(
        f"`samplers[{name!r}]` must return latents of shape"
        f" {batch.x_0.shape}, like the batch's; got {x_0.shape}."
      )
    videos.append(_grey(decode(x_0)))
  return np.concatenate(videos)[: len(prompts.captions)]


def _grey(video: Any) -> np.ndarray:
  """Returns [b, f, h, w], without a channel axis."""
  video = np.asarray(video)
  return video.mean(axis=-1) if video.ndim == 5 else video


def _time(
  sample: Sampler, key: PRNGKeyArray, batch: Any, pattern: ChunkPattern
) -> dict[str, float]:
  """Times one clip, the best of a few warm calls."""
  one = jax.tree.map(lambda leaf: leaf[:1], batch)
  frames = one.x_0.shape[1]
  seconds = []
  for i in range(1 + _TIMED_CALLS):
    key_i = jax.block_until_ready(jax.random.fold_in(key, i))
    start = time.perf_counter()
    jax.block_until_ready(sample(key_i, one))
    seconds.append(time.perf_counter() - start)
  best = min(seconds[1:])  # the first call compiles
  return {
    "latency_ms": 1000 * best / pattern.num_chunks(frames),
    "frames_per_second": frames / best,
  }


class _Description(NamedTuple):
  """What is measured of a set of clips before it is compared with another."""

  looks: np.ndarray  # [n, 2 d]: frame features, mean and deviation over time
  motion: np.ndarray  # [n, 4]: velocity of all ink, likewise
  first_chunk: np.ndarray  # [n, d]: frame features, mean over the chunk
  last_chunk: np.ndarray  # [n, d]
  probabilities: np.ndarray  # [n, f, digits]


def _describe(
  classifier: Classifier, video: np.ndarray, pattern: ChunkPattern
) -> _Description:
  features, probabilities = classifier(video)
  velocity = np.diff(_motion.track(_motion.ink(video), 1)[:, :, 0], axis=1)
  spans = pattern.spans(video.shape[1])
  chunk_mean = lambda start, stop: features[:, start:stop].mean(axis=1)
  return _Description(
    looks=_features.over_time(features),
    motion=_features.over_time(velocity),
    first_chunk=chunk_mean(*spans[0]),
    last_chunk=chunk_mean(*spans[-1]),
    probabilities=probabilities,
  )


@dataclasses.dataclass(frozen=True)
class _Scorer:
  """Compares clips with real ones, in spaces that the real ones define."""

  classifier: Classifier
  pattern: ChunkPattern
  real: _Description
  looks: _features.FeatureSpace
  motion: _features.FeatureSpace
  chunk: _features.FeatureSpace

  @classmethod
  def fit(
    cls, classifier: Classifier, video: np.ndarray, pattern: ChunkPattern
  ) -> "_Scorer":
    real = _describe(classifier, video, pattern)
    chunks = np.concatenate([real.first_chunk, real.last_chunk])
    fit = _features.FeatureSpace.fit
    return cls(
      classifier,
      pattern,
      real,
      looks=fit(real.looks, components=CLIP_COMPONENTS),
      motion=fit(real.motion, components=real.motion.shape[1]),
      chunk=fit(chunks, components=CHUNK_COMPONENTS),
    )

  def __call__(
    self, video: np.ndarray, captions: Sequence[str]
  ) -> dict[str, float]:
    clips = _describe(self.classifier, video, self.pattern)
    digits, velocity = _motion.captioned_motion(captions)
    features = self._clip_features(clips)
    return {
      "frechet": _metrics.frechet_distance(
        features, self._clip_features(self.real)
      ),
      "digit_accuracy": 100
      * _metrics.digit_accuracy(clips.probabilities, digits),
      "motion_error": float(np.nanmean(_motion.motion_error(video, velocity))),
      "diversity": _metrics.diversity(features, digits),
      "drift": _metrics.drift(
        self.chunk(clips.first_chunk),
        self.chunk(clips.last_chunk),
        self.chunk(self.real.first_chunk),
        self.chunk(self.real.last_chunk),
      ),
    }

  def _clip_features(self, clips: _Description) -> np.ndarray:
    spaces = self.looks(clips.looks), self.motion(clips.motion)
    return np.concatenate(spaces, axis=-1)
