"""The networks of the golden cases, and how a case's numbers are compared."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np

from crcm_jax import ChunkPattern, models
from crcm_jax.testing import golden

GOLDEN = pathlib.Path(__file__).parent / "golden"


@functools.cache
def network(name):
  """Returns the model and the float64 parameters of a recorded network."""
  weights = golden.load(GOLDEN / "weights.npz", name)
  config = models.WanConfig.from_wan(weights.config)
  _, params = models.params_from_torch(weights.arrays, config, dtype=np.float64)
  return models.Wan(config), params


def pattern(case):
  """Returns the chunk pattern of a case, `c1-3` in its settings."""
  first, rest = case.config["pattern"].removeprefix("c").split("-")
  return ChunkPattern(int(first), int(rest))


def f64(array):
  """Returns a recorded array as float64."""
  return jnp.asarray(np.asarray(array, np.float64))


def video(case, name):
  """Returns a recorded video, channels last, as float64."""
  return f64(case.video(name))


def check_case(case, per_example, grads):
  """Compares losses at 1e-9 and gradients at 1e-8 relative L2."""
  np.testing.assert_allclose(
    per_example, case["loss_per_sample"], rtol=1e-9, atol=1e-12
  )
  model, _ = network("student")
  ours = models.params_to_torch(grads, model.config, layout="rcm")
  norm = np.sqrt(sum(np.sum(g**2) for g in ours.values()))
  np.testing.assert_allclose(norm, case["grad_norm"], rtol=1e-8)
  recorded = case.grads()
  if recorded:
    assert recorded.keys() == ours.keys()
    error = sum(np.sum((ours[k] - recorded[k]) ** 2) for k in recorded)
    assert np.sqrt(error) < 1e-8 * norm, f"relative L2 {np.sqrt(error) / norm}"
