"""Block masks: the reference's, and how they are cut for kernels."""

import itertools
import json
import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import parity
import pytest
from parity import GOLDEN

from crcm_jax.kernels import BlockMask, Row


def boundaries(first, chunk, frames, frame_tokens):
  return tuple(frame_tokens * f for f in (0, *range(first, frames + 1, chunk)))


def from_record(record, frames):
  """The mask of one record of the reference's index."""
  spans = boundaries(
    record["first"], record["chunk"], frames, record["frame_tokens"]
  )
  options = dict(
    window=record["local_attn_blocks"] or None, sink=record["sink_blocks"]
  )
  if record["mode"] == "teacher_forcing":
    return BlockMask.teacher_forcing(spans, **options)
  asked = record["key"].startswith("bcq")
  return BlockMask.block_causal(
    spans,
    query_chunk=record["q_block_offset"] if asked else None,
    **options,
  )


def test_every_mask_of_the_reference():
  """Golden: NVlabs/rcm, FlexAttention's masks (SPEC section 3, S5)."""
  golden = np.load(GOLDEN / "masks.npz")
  index = json.loads(str(golden["index"]))
  assert len(index) == 286
  for record in index:
    shape = record["Q"], record["KV"]
    bits = np.unpackbits(golden[record["key"]], count=shape[0] * shape[1])
    mask = from_record(record, record["T"])
    want = bits.reshape(shape)
    parity.check(f"masks/{record['key']}", "mask", mask.dense(), want)


def test_both_masks_of_the_reference_are_one_here():
  """SPEC S5: its second one, for tangents, forgets noisy queries' sinks."""
  golden = np.load(GOLDEN / "masks.npz")
  index = json.loads(str(golden["index"]))
  differing = [r for r in index if f"{r['key']}_magi" in golden.files]
  assert len(differing) == 10
  for record in differing:
    size = record["Q"]
    bits = np.unpackbits(golden[f"{record['key']}_magi"], count=size**2)
    theirs = bits.reshape(size, size).astype(bool)
    ours = from_record(record, record["T"]).dense()
    assert not (theirs & ~ours).any()  # It hides, it shows nothing more.
    missing = np.argwhere(ours & ~theirs)
    sink = record["sink_blocks"] * record["first"] * record["frame_tokens"]
    assert len(missing) > 0
    assert (missing[:, 0] >= size // 2).all()  # noisy queries
    assert (missing[:, 1] < sink).all()  # clean sinks


recipes = st.tuples(
  st.sampled_from(["block_causal", "teacher_forcing", "noisy_rows"]),
  st.lists(st.integers(1, 5), min_size=1, max_size=5),
  st.none() | st.integers(1, 4),
  st.integers(0, 2),
)
settings = hypothesis.settings(deadline=None, max_examples=50)


def make(recipe):
  kind, sizes, window, sink = recipe
  spans = tuple(itertools.accumulate(sizes, initial=0))
  return getattr(BlockMask, kind)(spans, window=window, sink=sink)


def test_noisy_rows_are_the_lower_half_of_teacher_forcing():
  spans = (0, 2, 3, 7)
  whole = BlockMask.teacher_forcing(spans, window=2, sink=1).dense()
  noisy = BlockMask.noisy_rows(spans, window=2, sink=1).dense()
  np.testing.assert_array_equal(whole[7:], noisy)


def test_visible_pairs_are_counted():
  mask = BlockMask.noisy_rows((0, 2, 5))
  dense = mask.dense()
  assert mask.visible_pairs((5, 5)) == [dense[:, :5].sum(), dense[:, 5:].sum()]


def test_a_mask_is_a_static_argument():
  first, second = (BlockMask.block_causal((0, 2, 4)) for _ in range(2))
  assert first == second
  assert hash(first) == hash(second)


@settings
@hypothesis.given(recipes, st.integers(1, 4))
def test_shards_hold_every_nth_query(recipe, n):
  mask = make(recipe)
  hypothesis.assume(mask.num_queries % n == 0)
  for i, shard in enumerate(mask.shard_rows(n)):
    np.testing.assert_array_equal(shard.dense(), mask.dense()[i::n])


def test_shards_of_divisible_rows_are_one_program():
  shards = BlockMask.block_causal((0, 4, 12)).shard_rows(4)
  assert len(set(shards)) == 1


@settings
@hypothesis.given(recipes, st.integers(1, 6), st.integers(0, 3))
def test_tile_table_covers_the_mask(recipe, block, cut):
  mask = make(recipe)
  lengths = [min(cut, mask.num_keys), mask.num_keys - min(cut, mask.num_keys)]
  table = mask.tile_table(block, lengths)
  size = mask.tile_size(block)
  assert size <= block
  dense = np.zeros((mask.num_queries, mask.num_keys), int)
  for tile, (start, stop) in enumerate(table.queries):
    assert stop - start <= size
    for offset, keys in zip((0, lengths[0]), table.keys, strict=True):
      for first, last in keys[tile]:
        dense[start:stop, offset + first : offset + last] += 1
  np.testing.assert_array_equal(dense, mask.dense().astype(int))


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (
      lambda: BlockMask.block_causal((1, 4)),
      "`boundaries` must ascend from 0 to the number of tokens",
    ),
    (
      lambda: BlockMask.noisy_rows((0, 4, 4)),
      "got (0, 4, 4). `ChunkPattern.token_boundaries` makes them.",
    ),
    (
      lambda: BlockMask.block_causal((0, 4), window=0),
      "`window` counts chunks, the query's own included, so it must be at "
      "least 1; got 0. Use None for no window.",
    ),
    (
      lambda: BlockMask.block_causal((0, 4), sink=-1),
      "`sink` must be at least 0 chunks; got -1.",
    ),
    (
      lambda: BlockMask.block_causal((0, 4, 8), query_chunk=2),
      "`query_chunk` must be one of the 2 chunks, 0 to 1; got 2.",
    ),
    (
      lambda: BlockMask.block_causal((0, 4)).shard_rows(3),
      "`n` must divide the 4 queries; got 3.",
    ),
    (
      lambda: BlockMask((Row((1, 2), ()),), 3),
      "`rows` must cover the queries in order without gaps",
    ),
    (
      lambda: BlockMask((Row((0, 2), ((1, 4),)),), 3),
      "`keys` of a row must be disjoint ascending ranges within (0, 3)",
    ),
  ],
)
def test_messages(build, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    build()


@pytest.mark.parametrize(
  "mask",
  [
    BlockMask.noisy_rows((0, 3, 7, 12), window=2, sink=1),
    BlockMask.teacher_forcing((0, 4, 5, 9)),
    BlockMask.full(5, 18),
  ],
)
def test_transposed_masks_are_the_transposed_matrix(mask):
  """Side by side, over any cut of the keys into arrays."""
  lengths = (mask.num_keys // 3, mask.num_keys - mask.num_keys // 3)
  parts = [m.dense() for m in mask.transposed(lengths)]
  np.testing.assert_array_equal(np.concatenate(parts), mask.dense().T)
