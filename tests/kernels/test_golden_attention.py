"""The reference's masked attention and its tangent."""

import json

import jax
import numpy as np
import parity
import pytest
from parity import GOLDEN, real

from crcm_jax import kernels

ATTENTION = np.load(GOLDEN / "attention.npz")
INDEX = {r["key"]: r for r in json.loads(str(ATTENTION["index"]))}

pytestmark = pytest.mark.usefixtures("precision")


def mask_of(record):
  if record["mode"] not in ("teacher_forcing", "block_causal"):
    return None
  ft = record["frame_tokens"]
  half = 2 if record["mode"] == "teacher_forcing" else 1
  frames = record["KV"] // ft // half
  spans = [0, *range(record["first"], frames + 1, record["chunk"])]
  spans = tuple(ft * f for f in spans)
  options = dict(
    window=record["local_attn_blocks"] or None, sink=record["sink_blocks"]
  )
  if half == 2:
    return kernels.BlockMask.teacher_forcing(spans, **options)
  chunk = None
  if record["key"].startswith("bcq"):
    chunk = record["q_block_offset"]
  return kernels.BlockMask.block_causal(spans, query_chunk=chunk, **options)


@pytest.mark.parametrize("key", INDEX)
def test_output_and_tangent(key):
  load = lambda *names: tuple(real(ATTENTION[f"{key}/{n}"]) for n in names)
  attend = jax.jit(
    lambda q, k, v: kernels.attention(q, k, v, mask=mask_of(INDEX[key]))
  )
  o, to = jax.jvp(attend, load("q", "k", "v"), load("tq", "tk", "tv"))
  for name, got in (("o", o), ("to", to)):
    want = ATTENTION[f"{key}/{name}"]
    parity.check(f"attention/{key}", name, got, want)
