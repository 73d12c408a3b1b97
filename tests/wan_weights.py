"""Weights that follow from their names: recordings need not hold them."""

import zlib

import numpy as np


def tensor(key, shape):
  """Returns random numbers of a useful size for a torch parameter."""
  rng = np.random.default_rng(zlib.crc32(key.encode()))
  values = rng.normal(size=shape)
  if "norm" in key.rpartition(".")[0].rpartition(".")[2] or "gamma" in key:
    values = ("bias" not in key) + 0.2 * values
  elif key.endswith(("weight", "kernel")) and len(shape) > 1:
    values /= np.sqrt(np.prod(shape[1:]))
  else:
    values *= 0.2
  return values.astype(np.float32)


def state_dict(shapes):
  """Returns a parameter for each key."""
  return {key: tensor(key, tuple(shape)) for key, shape in shapes.items()}


def uniform(name, shape):
  """Returns an input, uniform in [-1, 1]."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.uniform(-1, 1, size=shape).astype(np.float32)


def normal(name, shape):
  """Returns an input, normal."""
  rng = np.random.default_rng(zlib.crc32(name.encode()))
  return rng.normal(size=shape).astype(np.float32)
