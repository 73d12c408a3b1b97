"""Scores samplers beside held-out real clips, and times them.

A sampler is any `sample(key, batch) -> x_0` that returns latents like
`batch.x_0`; how it was trained and how many steps it takes is its own affair.
All samplers are asked for the same captions with the same keys.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from crcm_jax import data
from crcm_jax._typing import Array, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.evaluation import _scores, _video
from crcm_jax.evaluation._classifier import Classifier
from crcm_jax.evaluation._results import REAL, Results

_TIMED_CALLS = 3


@runtime_checkable
class Sampler(Protocol):
  """Generates one clip for each example of a batch."""

  def __call__(self, key: PRNGKeyArray, batch: Any) -> Array:
    """Returns latents shaped like `batch.x_0`, for the batch's conditions."""
    ...


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
  score = _scores.Scorer.fit(classifier, reference.video, pattern)

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
      "clip_components": _scores.CLIP_COMPONENTS,
      "chunk_components": _scores.CHUNK_COMPONENTS,
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
