"""ChunkPattern: frames, chunks and tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcm_jax.chunks import ChunkPattern

sizes = st.integers(1, 5)


def test_spans_chunks_and_boundaries_of_one_video():
  pattern = ChunkPattern(1, 3)
  assert pattern.num_chunks(7) == 3
  assert pattern.spans(7) == ((0, 1), (1, 4), (4, 7))
  np.testing.assert_array_equal(
    pattern.chunk_of_frame(7), [0, 1, 1, 1, 2, 2, 2]
  )
  assert pattern.token_boundaries(7, 6) == (0, 6, 24, 42)


@settings(max_examples=50, deadline=None)
@given(first=sizes, rest=sizes, later=st.integers(0, 6), tokens=sizes)
def test_chunks_tile_the_frames(first, rest, later, tokens):
  pattern = ChunkPattern(first, rest)
  frames = first + later * rest
  spans = pattern.spans(frames)
  assert len(spans) == pattern.num_chunks(frames) == later + 1
  covered = [i for start, stop in spans for i in range(start, stop)]
  assert covered == list(range(frames))
  chunk = pattern.chunk_of_frame(frames)
  assert all((chunk[a:b] == i).all() for i, (a, b) in enumerate(spans))
  edges = pattern.token_boundaries(frames, tokens)
  assert edges[0] == 0
  assert edges[-1] == frames * tokens


def test_one_chunk_holds_a_bidirectional_model():
  assert ChunkPattern(9, 1).spans(9) == ((0, 9),)


@pytest.mark.parametrize(
  ("frames", "cure"), [(8, "Near it are 7 and 10"), (0, "shortest video has 1")]
)
def test_frames_that_do_not_fit_are_refused(frames, cure):
  with pytest.raises(ValueError, match=rf"`frames` must be .* {cure}"):
    ChunkPattern(1, 3).num_chunks(frames)


def test_empty_chunks_are_refused():
  with pytest.raises(ValueError, match="`first` must be at least 1 frame"):
    ChunkPattern(0, 3)
  with pytest.raises(ValueError, match="`rest` must be at least 1 frame"):
    ChunkPattern(1, 0)


def test_equal_patterns_are_one_compilation_key():
  assert hash(ChunkPattern(1, 3)) == hash(ChunkPattern(1, 3))
