"""What happens to a streamed video's pixels from chunk to chunk.

A student that sees its own past repeats its own mistakes: brightness drifts,
contrast grows, colours saturate. Of each chunk's pixels, by channel, the mean m
and the standard deviation s tell, and

    drift = sqrt( mean over channels of (m - m_first)^2 + (s - s_first)^2 ),

the 2-Wasserstein distance of the two normal distributions. Real clips have some
of it too, since they move: compare with theirs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SATURATED = 1 - 1 / 255
"""Pixels at least so far from 0 count as saturated: 8 bits clip them."""


class ChunkStatistics(NamedTuple):
  """Statistics of each clip's chunks."""

  mean: Float[np.ndarray, "b chunks"]
  """Of all pixel values."""
  std: Float[np.ndarray, "b chunks"]
  """Of all pixel values."""
  saturated: Float[np.ndarray, "b chunks"]
  """Share of pixel values at or beyond the ends of the range."""
  drift: Float[np.ndarray, "b chunks"]
  """Distance from the first chunk, which has none."""


def chunk_statistics(
  video: Float[np.ndarray, "b f h w c"], spans: Sequence[tuple[int, int]]
) -> ChunkStatistics:
  """Measures clips chunk by chunk.

  Args:
    video: pixels in [-1, 1], or beyond.
    spans: first frame and end of each chunk, as `ChunkPattern.spans` gives.

  Returns:
    The statistics.

  Raises:
    ValueError: if a span is empty or ends behind the video.

  Example:
    >>> video = np.zeros((1, 2, 1, 1, 1))
    >>> video[:, 1] = 1.0
    >>> chunk_statistics(video, [(0, 1), (1, 2)]).drift
    array([[0., 1.]])
  """
  for start, stop in spans:
    if not 0 <= start < stop <= video.shape[1]:
      raise ValueError(
        f"`spans` must lie within the {video.shape[1]} frames and hold one at"
        f" least; got {(start, stop)}."
      )
  chunks = [video[:, a:b].astype(np.float64) for a, b in spans]
  of_pixels, of_all = (1, 2, 3), (1, 2, 3, 4)
  m = np.stack([x.mean(axis=of_pixels) for x in chunks], axis=1)  # [b n c]
  s = np.stack([x.std(axis=of_pixels) for x in chunks], axis=1)
  square = (m - m[:, :1]) ** 2 + (s - s[:, :1]) ** 2
  over = [(np.abs(x) >= SATURATED).mean(axis=of_all) for x in chunks]
  return ChunkStatistics(
    mean=m.mean(axis=-1),
    std=np.stack([x.std(axis=of_all) for x in chunks], axis=1),
    saturated=np.stack(over, axis=1),
    drift=np.sqrt(square.mean(axis=-1)),
  )
