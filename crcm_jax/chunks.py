"""How latent frames form chunks: the only source of block-causal structure.

A causal video model generates chunk after chunk. The first chunk holds
`first` latent frames (often one: a VAE encodes the first image alone), each
later one holds `rest`:

    frames   0 | 1 2 3 | 4 5 6        ChunkPattern(first=1, rest=3)
    chunk    0 |   1   |   2

Masks, caches, rollouts and per-chunk times all derive from this pattern.
"""

import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class ChunkPattern:
  """A split of latent frames into chunks, hashable.

  Attributes:
    first: number of latent frames in chunk 0.
    rest: number of latent frames in each later chunk.

  Raises:
    ValueError: if a chunk would be empty.

  Example:
    >>> pattern = ChunkPattern(first=1, rest=3)
    >>> pattern.spans(frames=7)
    ((0, 1), (1, 4), (4, 7))
  """

  first: int
  rest: int

  def __post_init__(self):
    for name in ("first", "rest"):
      size = getattr(self, name)
      if size < 1:
        raise ValueError(
          f"`{name}` must be at least 1 frame: a chunk cannot be empty;"
          f" got {size}."
        )

  def num_chunks(self, frames: int) -> int:
    """Returns the number of chunks in a video of `frames` latent frames.

    Raises:
      ValueError: if the frames do not fill whole chunks.
    """
    later, remainder = divmod(frames - self.first, self.rest)
    if later < 0 or remainder:
      raise ValueError(
        f"`frames` must be {self.first} plus a multiple of {self.rest} to"
        f" fill the chunks of {self}; got {frames}. {self._nearest(frames)}"
      )
    return 1 + later

  def spans(self, frames: int) -> tuple[tuple[int, int], ...]:
    """Returns each chunk's (start, stop) in latent frames.

    Raises:
      ValueError: if the frames do not fill whole chunks.
    """
    edges = self.token_boundaries(frames, tokens_per_frame=1)
    return tuple(itertools.pairwise(edges))

  def chunk_of_frame(self, frames: int) -> np.ndarray:
    """Returns the chunk index of each frame, int32 `[f]`.

    `t_chunk[:, pattern.chunk_of_frame(f)]` repeats a time per chunk over the
    chunk's frames.

    Raises:
      ValueError: if the frames do not fill whole chunks.
    """
    sizes = [stop - start for start, stop in self.spans(frames)]
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

  def token_boundaries(
    self, frames: int, tokens_per_frame: int
  ) -> tuple[int, ...]:
    """Returns where chunks begin and end in a sequence of frame-major tokens.

    Args:
      frames: number of latent frames.
      tokens_per_frame: number of tokens of one latent frame.

    Returns:
      `num_chunks + 1` increasing token indices, from 0 to all tokens: chunk
      `i` holds the tokens `boundaries[i]` up to `boundaries[i + 1]`.

    Raises:
      ValueError: if the frames do not fill whole chunks.
    """
    later = range(self.num_chunks(frames))
    stops = (self.first + i * self.rest for i in later)
    return (0, *(stop * tokens_per_frame for stop in stops))

  def _nearest(self, frames: int) -> str:
    """Says which frame counts close to `frames` would do."""
    below = self.first + max(0, (frames - self.first) // self.rest) * self.rest
    if below > frames:
      return f"The shortest video has {below}."
    return f"Near it are {below} and {below + self.rest}."
