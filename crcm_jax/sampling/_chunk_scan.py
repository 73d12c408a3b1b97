"""A loop over the chunks of a video, whose program does not grow with them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from crcm_jax._typing import Array
from crcm_jax.chunks import ChunkPattern


def chunk_sizes(
  pattern: ChunkPattern, given: int, generated: int
) -> tuple[list[int], int]:
  """Returns frames per chunk, and how many chunks the given frames make.

  Args:
    pattern: how frames form chunks.
    given: frames that are there already, whole chunks.
    generated: frames that follow.

  Raises:
    ValueError: if the frames, given or all, are not whole chunks.
  """
  spans = pattern.spans(given + generated)
  ends = [0, *(stop for _, stop in spans)]
  if given not in ends[:-1]:
    raise ValueError(
      "`prefix` must be whole chunks with at least one chunk after it: "
      f"{ends[1:-1]} frames of {given + generated} under {pattern}; got "
      f"{given}."
    )
  return [stop - start for start, stop in spans], ends.index(given)


def over_chunks(
  body: Callable[[Any, Any, Any], tuple[Any, Any]],
  carry: Any,
  sizes: Sequence[int],
  frames: Any,
  rows: Any,
) -> tuple[Any, Any]:
  """Runs `carry, out = body(carry, chunk_frames, row)` over all chunks.

  Equal chunks share one `lax.scan`; a first chunk of another size runs before
  it. The size of the program does not depend on the number of chunks.

  Args:
    body: what to do with a chunk.
    carry: what it hands to the next.
    sizes: frames of each chunk; all but the first are equal.
    frames: arrays with frames along axis 1, split among the chunks.
    rows: arrays with chunks along axis 0.

  Returns:
    The last carry, and the outputs joined along their axis 1.
  """
  apart = int(sizes[0] != sizes[-1])
  outs = []
  if apart:
    head = jax.tree.map(lambda a: a[:, : sizes[0]], frames)
    row = jax.tree.map(lambda a: a[0], rows)
    carry, out = body(carry, head, row)
    outs.append(out)
  equal = len(sizes) - apart
  tail = jax.tree.map(lambda a: a[:, apart * sizes[0] :], frames)
  xs = (
    jax.tree.map(lambda a: _split(a, equal), tail),
    jax.tree.map(lambda a: a[apart:], rows),
  )
  carry, out = lax.scan(lambda c, x: body(c, *x), carry, xs)
  outs.append(jax.tree.map(_join, out))
  return carry, jax.tree.map(lambda *a: jnp.concatenate(a, 1), *outs)


def _split(a: Array, chunks: int) -> Array:
  """[b, chunks * n, ...] -> [chunks, b, n, ...]."""
  a = a.reshape(a.shape[0], chunks, a.shape[1] // chunks, *a.shape[2:])
  return jnp.moveaxis(a, 1, 0)


def _join(a: Array) -> Array:
  """[chunks, b, n, ...] -> [b, chunks * n, ...]."""
  a = jnp.moveaxis(a, 0, 1)
  return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])
