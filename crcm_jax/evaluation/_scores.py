"""Scores of a set of clips against real ones.

Real clips define the feature spaces once (`Scorer.fit`); every other set is
then described and compared in them.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from crcm_jax.chunks import ChunkPattern
from crcm_jax.evaluation import _features, _metrics, _motion
from crcm_jax.evaluation._classifier import Classifier

CLIP_COMPONENTS = 16
"""Components of a clip's looks; 4 of its motion complete the clip's feature."""

CHUNK_COMPONENTS = 16
"""Components of a chunk's looks, for the drift."""


class Description(NamedTuple):
  """What is measured of a set of clips before it is compared with another."""

  looks: Float[np.ndarray, "n looks"]
  """Frame features: mean and deviation over time."""
  motion: Float[np.ndarray, "n motion"]
  """Velocity of all ink: mean and deviation over time."""
  first_chunk: Float[np.ndarray, "n d"]
  """Frame features: mean over the first chunk."""
  last_chunk: Float[np.ndarray, "n d"]
  """Frame features: mean over the last chunk."""
  probabilities: Float[np.ndarray, "n f digits"]
  """How likely each digit is visible in each frame."""


def describe(
  classifier: Classifier,
  video: Float[np.ndarray, "n f h w"],
  pattern: ChunkPattern,
) -> Description:
  """Measures a set of clips.

  Args:
    classifier: describes frames.
    video: grey clips in [-1, 1].
    pattern: says which frames are the first chunk and which the last.

  Returns:
    The description.
  """
  features, probabilities = classifier(video)
  tracks = _motion.track(_motion.ink(video), 1)[:, :, 0]
  (_, first_stop), *_ = spans = pattern.spans(video.shape[1])
  last_start, _ = spans[-1]
  return Description(
    looks=_features.over_time(features),
    motion=_features.over_time(np.diff(tracks, axis=1)),
    first_chunk=features[:, :first_stop].mean(axis=1),
    last_chunk=features[:, last_start:].mean(axis=1),
    probabilities=probabilities,
  )


@dataclasses.dataclass(frozen=True)
class Scorer:
  """Compares clips with real ones, in spaces that the real ones define.

  Attributes:
    classifier: describes frames.
    pattern: of the clips' chunks.
    real: the real clips to compare with.
    looks: space of the clips' looks.
    motion: space of the clips' motion.
    chunk: space of the chunks' looks.
  """

  classifier: Classifier
  pattern: ChunkPattern
  real: Description
  looks: _features.FeatureSpace
  motion: _features.FeatureSpace
  chunk: _features.FeatureSpace

  @classmethod
  def fit(
    cls,
    classifier: Classifier,
    video: Float[np.ndarray, "n f h w"],
    pattern: ChunkPattern,
  ) -> "Scorer":
    """Takes real clips as the measure of others.

    Args:
      classifier: describes frames.
      video: real grey clips in [-1, 1].
      pattern: of their chunks.

    Returns:
      The scorer.

    Raises:
      ValueError: if there are too few clips.
    """
    real = describe(classifier, video, pattern)
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
    self, video: Float[np.ndarray, "n f h w"], captions: Sequence[str]
  ) -> dict[str, float]:
    """Scores clips.

    Args:
      video: grey clips in [-1, 1].
      captions: what each was to show.

    Returns:
      The quality metrics, by the keys of `METRICS`.
    """
    clips = describe(self.classifier, video, self.pattern)
    features, real = self._features(clips), self._features(self.real)
    digits, velocity = _motion.captioned_motion(captions)
    accuracy = _metrics.digit_accuracy(clips.probabilities, digits)
    errors = _motion.motion_error(video, velocity)
    named = errors[digits.any(axis=1)]
    return {
      "frechet": _metrics.frechet_distance(features, real),
      "digit_accuracy": 100 * accuracy,
      "motion_error": float(named.mean()) if named.size else float("nan"),
      "diversity": _metrics.diversity(features, digits),
      "drift": self._drift(clips),
    }

  def _features(self, clips: Description) -> np.ndarray:
    spaces = self.looks(clips.looks), self.motion(clips.motion)
    return np.concatenate(spaces, axis=-1)

  def _drift(self, clips: Description) -> float:
    return _metrics.drift(
      self.chunk(clips.first_chunk),
      self.chunk(clips.last_chunk),
      self.chunk(self.real.first_chunk),
      self.chunk(self.real.last_chunk),
    )
