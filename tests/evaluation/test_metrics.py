"""The metrics against closed forms and hand-made cases."""

import numpy as np
import pytest

from crcm_jax import evaluation


def _gaussian(rng, n, mean, root):
  """Draws n vectors whose sample moments are exactly `mean`, `root root^T`."""
  x = rng.normal(size=(n, len(mean)))
  x -= x.mean(axis=0)
  x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
  return x @ root.T + mean


def test_frechet_distance_of_commuting_gaussians_is_the_closed_form():
  # Diagonal covariances: |m1 - m2|^2 + sum (sqrt(a) - sqrt(b))^2.
  rng = np.random.default_rng(0)
  a, b = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.25])
  x = _gaussian(rng, 50, np.array([0.0, 1.0, 2.0]), np.diag(a))
  y = _gaussian(rng, 80, np.array([1.0, 1.0, 0.0]), np.diag(b))
  expected = 1 + 4 + np.sum((a - b) ** 2)
  assert evaluation.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_non_commuting_gaussians():
  # In two dimensions tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for any M with
  # positive eigenvalues, here M = S1 S2.
  rng = np.random.default_rng(1)
  root_1 = np.array([[1.0, 0.0], [0.8, 0.5]])
  root_2 = np.array([[2.0, -0.3], [0.1, 0.7]])
  s1, s2 = root_1 @ root_1.T, root_2 @ root_2.T
  product = s1 @ s2
  trace_root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = np.trace(s1) + np.trace(s2) - 2 * trace_root
  x = _gaussian(rng, 40, np.zeros(2), root_1)
  y = _gaussian(rng, 60, np.zeros(2), root_2)
  assert evaluation.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
  assert evaluation.frechet_distance(y, x) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_for_equal_and_singular_sets():
  x = np.random.default_rng(2).normal(size=(10, 30))  # rank 9 in 30 dimensions
  assert evaluation.frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_one_distribution_follows_the_stated_bias():
  rng = np.random.default_rng(3)
  n, d = 256, 20
  draws = [
    evaluation.frechet_distance(
      rng.normal(size=(n, d)), rng.normal(size=(n, d))
    )
    for _ in range(20)
  ]
  assert np.mean(draws) == pytest.approx((2 * d + d * (d + 1) / 2) / n, rel=0.1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frechet_distance_of_non_finite_features_is_nan(value):
  x = np.ones((5, 2))
  x[3, 1] = value
  assert np.isnan(evaluation.frechet_distance(x, np.ones((5, 2))))


def test_digit_accuracy_counts_captioned_digits_among_the_likeliest():
  captioned = np.zeros((3, 10), bool)
  captioned[0, 4] = captioned[1, [2, 7]] = captioned[2, [1, 3]] = True
  probabilities = np.full((3, 5, 10), 0.1)
  probabilities[0, :, 4] = 0.9  # right
  probabilities[1, :, [2, 5]] = 0.9  # one of two
  probabilities[2, :, [8, 9]] = 0.9  # none
  accuracy = evaluation.digit_accuracy(probabilities, captioned)
  assert accuracy == pytest.approx((1 + 0.5 + 0) / 3)


def test_diversity_compares_clips_of_the_same_digits_only():
  captioned = np.zeros((4, 10), bool)
  captioned[[0, 1, 2], 4] = captioned[3, 5] = True
  features = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [99.0, 99.0]])
  diversity = evaluation.diversity(features, captioned)
  assert diversity == pytest.approx((5 + 0 + 5) / 3)
  assert np.isnan(evaluation.diversity(features[2:], captioned[2:]))


def test_drift_is_positive_when_the_end_is_worse():
  rng = np.random.default_rng(4)
  real = rng.normal(size=(200, 3))
  assert evaluation.drift(real, real + 2, real, real) == pytest.approx(12)
  assert evaluation.drift(real, real, real, real) == pytest.approx(0, abs=1e-9)


def test_feature_space_makes_real_features_standard():
  rng = np.random.default_rng(5)
  real = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 8)) + 5
  space = evaluation.FeatureSpace.fit(real, components=4)
  z = space(real)
  np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-9)
  np.testing.assert_allclose(
    np.cov(z, rowvar=False, bias=True), np.eye(4), atol=1e-4
  )


def test_feature_space_asks_for_more_clips(unchecked):
  with pytest.raises(
    ValueError, match=r"more clips than `components`, 4; got 3"
  ):
    evaluation.FeatureSpace.fit(np.ones((3, 8)), components=4)


def test_over_time_is_mean_and_deviation():
  series = np.array([[[1.0], [3.0]]])
  np.testing.assert_allclose(evaluation.over_time(series), [[2.0, 1.0]])
