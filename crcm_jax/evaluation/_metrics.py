r"""Numbers that say how good a set of clips is.

Each is a plain function of NumPy arrays in float64. `evaluate` computes them
for every sampler and for held-out real clips; a score means little without
that floor beside it.
"""

import numpy as np
from jaxtyping import Bool, Float


def frechet_distance(
  features: Float[np.ndarray, "n d"], reference: Float[np.ndarray, "m d"]
) -> float:
  r"""Returns the Frechet distance between the Gaussians fitted to two sets.

  $$|\mu_1 - \mu_2|^2
    + \mathrm{tr}\,(\Sigma_1 + \Sigma_2
    - 2\,(\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2})$$

  The square roots are those of symmetric positive semi-definite matrices, by
  eigenvalues that rounding made negative set to zero, so the result is real
  and finite for singular covariances too.

  The estimate is biased upwards: two sets of n clips of one distribution with
  unit covariance in d dimensions score about $(2d + d(d + 1) / 2) / n$. Compare
  only scores of equal n, beside the floor.

  Args:
    features: one row per clip.
    reference: one row per real clip.

  Returns:
    The distance, zero when mean and covariance agree; NaN if a feature is not
    finite or a set has fewer than two clips.

  References:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a
    Local Nash Equilibrium, https://arxiv.org/abs/1706.08500, Eq. 6.
  """
  if min(len(features), len(reference)) < 2:
    return float("nan")
  if not (np.isfinite(features).all() and np.isfinite(reference).all()):
    return float("nan")
  mean_1, covariance_1 = _moments(features)
  mean_2, covariance_2 = _moments(reference)
  root_1 = _symmetric_root(covariance_1)
  cross = _symmetric_root(root_1 @ covariance_2 @ root_1)
  spread = np.trace(covariance_1 + covariance_2 - 2 * cross)
  return float(np.sum((mean_1 - mean_2) ** 2) + max(spread, 0.0))


def digit_accuracy(
  probabilities: Float[np.ndarray, "b f digits"],
  captioned: Bool[np.ndarray, "b digits"],
) -> float:
  """Returns the share of captioned digits that a clip shows most clearly.

  With k the number of digits that a caption names, the k digits of largest
  mean probability over time are the clip's answer; its score is the share of
  the captioned digits among them. Guessing scores k / 10.

  Args:
    probabilities: how likely each digit is visible, per frame.
    captioned: which digits the caption names.

  Returns:
    The mean over clips, in [0, 1].
  """
  likely = np.nan_to_num(probabilities).mean(axis=1)
  rank = np.argsort(np.argsort(-likely, axis=1, kind="stable"), axis=1)
  count = captioned.sum(axis=1)
  answered = rank < count[:, None]
  right = (answered & captioned).sum(axis=1)
  return float(np.mean(right / np.maximum(count, 1)))


def diversity(
  features: Float[np.ndarray, "b d"], captioned: Bool[np.ndarray, "b digits"]
) -> float:
  r"""Returns how much clips of the same digits differ from one another.

  The mean of $|\phi_i - \phi_j|$ over all pairs of clips whose captions name
  the same digits. A model that draws one prototype for each caption scores
  near zero; noise scores high, so the aim is the value of real clips.

  Args:
    features: one row per clip.
    captioned: which digits the caption names.

  Returns:
    The mean distance; NaN when no two captions name the same digits.
  """
  same = (captioned[:, None] == captioned[None]).all(axis=-1)
  first, second = np.nonzero(np.triu(same, k=1))
  if first.size == 0:
    return float("nan")
  difference = features[first] - features[second]
  return float(np.mean(np.linalg.norm(difference, axis=-1)))


def drift(
  first: Float[np.ndarray, "n d"],
  last: Float[np.ndarray, "n d"],
  reference_first: Float[np.ndarray, "m d"],
  reference_last: Float[np.ndarray, "m d"],
) -> float:
  """Returns how much further from real clips the last chunk is than the first.

  `frechet(last chunk, real last chunk) - frechet(first chunk, real first
  chunk)`, on features of a chunk's frames. Zero: the quality holds over time.
  Positive: errors accumulate.

  Args:
    first: features of each clip's first chunk.
    last: features of each clip's last chunk.
    reference_first: the same of real clips.
    reference_last: the same of real clips.

  Returns:
    The difference of the two distances.
  """
  at_the_end = frechet_distance(last, reference_last)
  return at_the_end - frechet_distance(first, reference_first)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  features = features.astype(np.float64)
  covariance = np.cov(features, rowvar=False)
  return features.mean(axis=0), np.atleast_2d(covariance)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
  """Returns the root of a symmetric positive semi-definite matrix."""
  values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
