"""How fast clips are made, once all is compiled."""

import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax.generation._generator import Generator, Text


class Speed(NamedTuple):
  """The speed of making one clip; nothing is written."""

  first: float
  """Seconds from the prompt's embeddings to its first frame."""
  rate: float
  """Frames a second, decoded and in the host's memory."""
  transformer_rate: float
  """Frames a second of the latents alone."""

  def __str__(self) -> str:
    return (
      f"first frame after {self.first:.2f} s, {self.rate:.1f} frames/s end to"
      f" end, {self.transformer_rate:.1f} by the transformer alone"
    )


def warm_up(
  generator: Generator, text: Text, null: Text | None = None
) -> float:
  """Makes the first two chunks, and with them all programs of a clip.

  Returns:
    The seconds that it took.
  """
  start = time.perf_counter()
  pattern = generator.settings.pattern
  latents = None if pattern is None else pattern.first + pattern.rest
  for _ in itertools.islice(generator(text, null), latents):
    pass
  jnp.ones(()).block_until_ready()  # after what is still on its way
  return time.perf_counter() - start


def measure_speed(
  generator: Generator, text: Text, null: Text | None = None
) -> Speed:
  """Makes a clip, and its latents once more.

  Args:
    generator: after `warm_up`, or compiling is measured, too.
    text: embeddings of the prompt, `[1, l, d]`.
    null: of the negative prompt; needed where there is guidance.
  """
  frames = generator.settings.frames
  start = time.perf_counter()
  pieces = generator(text, null)
  next(pieces)
  first = time.perf_counter() - start
  for _ in pieces:
    pass
  whole = time.perf_counter() - start
  start = time.perf_counter()
  jax.block_until_ready(list(generator.latents(text, null)))
  alone = time.perf_counter() - start
  return Speed(first, frames / whole, frames / alone)
