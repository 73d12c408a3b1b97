"""The reference's masked attention and its tangent, in float64."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax import kernels

GOLDEN = np.load(
  pathlib.Path(__file__).parent.parent / "golden" / "attention.npz"
)
INDEX = {r["key"]: r for r in json.loads(str(GOLDEN["index"]))}


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
  """Golden: NVlabs/rcm's JVP attention at ed3cb14, run in float64."""
  with jax.enable_x64(True):
    load = lambda names: tuple(
      jnp.asarray(GOLDEN[f"{key}/{name}"], jnp.float64) for name in names
    )
    attend = jax.jit(
      lambda q, k, v: kernels.attention(q, k, v, mask=mask_of(INDEX[key]))
    )
    primals, tangents = load(("q", "k", "v")), load(("tq", "tk", "tv"))
    o, to = jax.jvp(attend, primals, tangents)
  np.testing.assert_allclose(o, GOLDEN[f"{key}/o"], rtol=0, atol=1e-13)
  np.testing.assert_allclose(to, GOLDEN[f"{key}/to"], rtol=0, atol=1e-12)
