"""One vector for each clip: what it looks like, how that changes, how it moves.

A clip's raw feature is

    [mean over time of its frame features, their standard deviation over time,
     mean velocity of its centre of mass, standard deviation of that velocity]

The classifier's features have more dimensions than a Frechet distance on a few
hundred clips can carry. `FeatureSpace` therefore keeps the principal
components of *real* clips, in units of their standard deviation, beside the
four motion numbers: the space is fixed before any sampler is looked at.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
  """An affine map that makes the leading components of real data standard.

  Attributes:
    mean: mean of the real vectors.
    projection: principal directions, each divided by its standard deviation.
  """

  mean: Float[np.ndarray, "raw"]
  projection: Float[np.ndarray, "raw d"]

  @classmethod
  def fit(
    cls, real: Float[np.ndarray, "n raw"], *, components: int
  ) -> "FeatureSpace":
    """Finds the leading principal components of real vectors.

    Args:
      real: one row per real clip.
      components: how many components to keep.

    Returns:
      The map; on `real` its outputs have zero mean and unit covariance.

    Raises:
      ValueError: if there are too few real clips for that many components.
    """
    if len(real) <= components:
      raise ValueError(
        f"`real` must hold more clips than `components`, {components}; got"
        f" {len(real)}. Evaluate more clips."
      )
    real = real.astype(np.float64)
    mean = real.mean(axis=0)
    _, size, directions = np.linalg.svd(real - mean, full_matrices=False)
    deviation = size[:components] / np.sqrt(len(real)) + _TINY
    return cls(mean, directions[:components].T / deviation)

  def __call__(self, raw: Float[np.ndarray, "n raw"]) -> np.ndarray:
    """Maps vectors into the space.

    Args:
      raw: one row per clip.

    Returns:
      One row of components per clip, [n, d].
    """
    return (raw - self.mean) @ self.projection


def over_time(series: Float[np.ndarray, "b f d"]) -> np.ndarray:
  """Returns mean and standard deviation over time, side by side.

  Args:
    series: a vector for each frame.

  Returns:
    [b, 2 d].
  """
  series = series.astype(np.float64)
  return np.concatenate([series.mean(axis=1), series.std(axis=1)], axis=-1)
