"""The networks of the golden cases, and how a case's numbers are compared."""

import functools

import jax.numpy as jnp
import numpy as np
import parity
from parity import GOLDEN, real

from crcm_jax import ChunkPattern, models
from crcm_jax.testing import golden

SKETCH = 64


def network(name):
  """Returns the model and the parameters of a recorded network."""
  return _network(name, jnp.result_type(float))


@functools.cache
def _network(name, dtype):
  weights = golden.load(GOLDEN / "weights.npz", name)
  config = models.WanConfig.from_wan(weights.config)
  _, params = models.params_from_torch(weights.arrays, config, dtype=dtype)
  return models.Wan(config), params


def pattern(case):
  """Returns the chunk pattern of a case, `c1-3` in its settings."""
  first, rest = case.config["pattern"].removeprefix("c").split("-")
  return ChunkPattern(int(first), int(rest))


def video(case, name):
  """Returns a recorded video, channels last."""
  return real(case.video(name))


def load(file, name):
  """Returns a recorded case."""
  return golden.load(GOLDEN / f"{file}.npz", name)


def check_case(file, case, per_example, grads):
  """Compares losses one by one, and gradients in the 2-norm."""
  name = f"{file}/{case.name}"
  parity.check_each(name, "loss", per_example, case["loss_per_sample"])
  model, _ = network("student")
  ours = models.params_to_torch(grads, model.config, layout="rcm")
  norm = np.linalg.norm(flat(ours))
  parity.check(name, "norm", norm, case["grad_norm"], "gradient")
  if recorded := case.grads():
    assert recorded.keys() == ours.keys()
    parity.check(name, "gradient", flat(ours), flat(recorded), "gradient")
  elif "grad_sketch" in case:
    want = case["grad_sketch"]
    parity.check(name, "sketch", sketch(ours), want, "gradient")


def sketch(arrays):
  """Returns a few random sums of all numbers, signs drawn.

  The distance of two sketches estimates the distance of what they are of, to
  about 20 %. They stand for gradients that would take too much room.
  """
  numbers = flat(arrays)
  draws = np.random.PCG64(0).random_raw(SKETCH * (numbers.size // 64 + 1))
  bits = np.unpackbits(draws.astype("<u8").view(np.uint8))
  signs = 2.0 * bits.reshape(SKETCH, -1)[:, : numbers.size] - 1
  return signs @ numbers / np.sqrt(SKETCH)


def flat(arrays):
  """Returns all numbers of named arrays in the order of the names."""
  parts = [np.ravel(arrays[name]) for name in sorted(arrays)]
  return np.concatenate(parts).astype(np.float64)
