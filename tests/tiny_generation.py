"""Tiny random networks that make videos, shared so that they compile once."""

import functools

import numpy as np

from crcm_jax import generation
from crcm_jax.chunks import ChunkPattern

SIZE = dict(frames=9, height=32, width=48)


@functools.cache
def networks():
  return generation.random_networks("tiny")


def generator(**changes):
  few_step = dict(pattern=ChunkPattern(1, 1), steps=(2, 1))
  settings = generation.Settings(**(SIZE | (changes or few_step)))
  return generation.Generator(networks(), settings)


def text(prompt="a cat"):
  return networks().embed([prompt])


@functools.cache
def clip():
  """The frames of a clip of two steps, then one."""
  return np.concatenate(list(generator()(text())))
