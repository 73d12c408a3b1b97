"""The Triton kernels, compiled for GPUs that are not there."""

import collections
import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot
ROOT = pathlib.Path(__file__).parent.parent.parent

# Matrix products of a launch, each there twice: for whole and for last blocks.
PRODUCTS = {
  "clean forward": [2 * 2],
  "noisy forward": [2 * (2 + 2)],
  "noisy output and tangent": [2 * (4 + 6)],  # the context has no tangent
  "noisy tangent": [2 * (5 + 5)],  # all operands have one; o is known
  "noisy backward": [2 * (3 + 3), 2 * 4, 2 * 4],  # dq; dk and dv of each stream
  "a frame over a cache": [2 * (2 + 2)],
}


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile(capability):
  """Every pass compiles, fits, and holds the products it needs, no more."""
  ran = subprocess.run(
    [sys.executable, "tools/compile_triton.py", str(capability), "--json"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr[-2000:]
  products = collections.defaultdict(list)
  for row in map(json.loads, ran.stdout.splitlines()):
    products[row["call"]].append(row["products"])
    if capability == 90 and row["call"] in PRODUCTS:
      assert row["spilled"] <= 64, row
  for call, expected in PRODUCTS.items():
    assert products[call] == expected, call
  assert {"heads of 256", "heads of 64, fp16", "float32"} <= set(products)
