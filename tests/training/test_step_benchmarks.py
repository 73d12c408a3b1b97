"""The benchmarks of train steps: what they count, and that they run."""

import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from crcm_jax import models
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training import flops

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def scripts(monkeypatch):
  """Where the benchmarks' modules are found."""
  folder = ROOT / "benchmarks"
  monkeypatch.syspath_prepend(str(folder))
  return folder


@pytest.fixture
def necessary(scripts):
  import _necessary

  return _necessary


@pytest.fixture
def two_tokens(necessary):
  """One layer, two frames of one token: small enough to count by hand."""
  config = models.WanConfig(
    layers=1,
    width=4,
    heads=2,
    ffn_width=8,
    freq_width=2,
    text_width=7,
    text_length=3,
    in_channels=3,
    out_channels=5,
    patch=(1, 1, 1),
  )
  return necessary.Video(
    config=config, frames=2, tokens=1, pattern=ChunkPattern(1, 1)
  )


def test_parts_are_as_counted_by_hand(two_tokens):
  # A token: six 4x4 matrices, 4x8, 8x4, 3 in, 5 out; a frame: 2x4, 4x4, 4x24.
  token = 6 * 16 + 2 * 32 + 4 * 3 + 4 * 5
  frame = 8 + 16 + 96
  assert two_tokens.linear == 2 * 2 * (token + frame) == 1248
  # A word: 7x4, 4x4, keys and values.
  assert two_tokens.text == 2 * 3 * (28 + 16 + 32) == 456
  # Both tokens see three words: q k^T and p v, each 2 x 4 a pair.
  assert two_tokens.cross == 2 * 8 * 6 == 96
  # Both see themselves, the second one the first.
  assert two_tokens.pairs == (1, 2)
  assert two_tokens.stream == 1248 + 96 + 2 * 8 * 3 == 1392
  assert two_tokens.bidirectional == 1248 + 96 + 456 + 2 * 8 * 4 == 1864
  # Of the past only queries move; of themselves, keys and values too.
  assert two_tokens.tangent == 1248 + 96 + 8 * (2 * 1 + 4 * 2) == 1424


def test_steps_are_sums_of_their_passes(necessary, two_tokens):
  forward = 2 * 1392 + 456
  assert (
    necessary.tf_scm(two_tokens, guided=True)
    == 2 * forward + 3 * forward + 1424
  )
  assert necessary.tf_scm(two_tokens, guided=False) == 4 * forward + 1424
  assert necessary.tf_dcm(two_tokens, guided=True) == (2 + 1 + 2 + 1) * forward
  rollout = (2 + 1) * 1392 + 456
  backward = 2 * (1248 + 96 + 456) + 8 * (2 * 1 + 4 * 2)
  assert (
    necessary.sf_dmd(two_tokens, steps=2, guided=True)
    == rollout + 3 * 1864 + backward
  )
  assert necessary.critic(two_tokens, steps=2) == rollout + 3 * 1864


@pytest.mark.parametrize(
  "name", ["tf_scm", pytest.param("tf_dcm", marks=pytest.mark.slow)]
)
def test_steps_agree_with_the_traced_ones(scripts, name):
  """At full size: by formula, and by counting in the program itself."""
  import _steps

  case = _steps.Case(name=name)
  stage = _steps.stage_of(case)
  counted = flops.step(stage)
  np.testing.assert_allclose(counted.total, _steps.flops_of(case), rtol=0.005)
  assert counted.attention / counted.total > 0.4


def test_collectives_that_hide_behind_kernels_are_not_exposed(scripts):
  import _trace

  events = [
    _trace.Event("/device:GPU:0", "gemm", 0, 10),
    _trace.Event("/device:GPU:0", "ncclDevKernel_AllGather", 5, 15),
    _trace.Event("/device:GPU:0", "gemm", 15, 20),
    _trace.Event("/device:GPU:1", "ncclDevKernel_AllGather", 0, 20),
  ]
  shares = _trace.collectives(events)
  assert shares == _trace.Collectives(share=0.5, exposed=0.25)
  slow = _trace.Event("/device:GPU:0", "slow", 0, 3e6)
  assert _trace.longest([*events, slow], 1) == [_trace.Kernel("slow", 1, 3.0)]


def test_the_longest_rollout_is_the_one_that_is_timed(scripts):
  import _steps

  for name, phase in (("sf_dmd", "student"), ("critic", "critic")):
    program = _steps.program_of(_steps.Case(name=name, tiny=True))
    at = program.iteration()
    assert program.stage.phase(at) == phase
    counters = program.stage.alternation.counters(at)
    count = counters.student if phase == "student" else counters.critic
    assert int(count) % 4 == 3  # the fourth of 1, 2, 3, 4 steps


@pytest.mark.slow
@pytest.mark.parametrize(
  ("script", "devices", "arguments", "rows"),
  [
    ("train_step.py", 1, ("--kernels", "2"), 4),
    ("scaling.py", 2, (), 6),
  ],
)
def test_scripts_run_at_tiny_size(script, devices, arguments, rows, tmp_path):
  path = tmp_path / "rows.json"
  flags = f"--xla_force_host_platform_device_count={devices}"
  done = subprocess.run(
    [
      *(sys.executable, ROOT / "benchmarks" / script, "--tiny"),
      *("--budget", "0", "--json", path, *arguments),
    ],
    env=os.environ
    | dict(JAX_PLATFORMS="cpu", XLA_FLAGS=flags, PYTHONPATH=str(ROOT)),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  written = json.loads(path.read_text())
  assert written["about"]["devices"] == devices
  assert len(written["rows"]) == rows
  for row in written["rows"]:
    assert row["error"] is None
    assert row["metrics"]["skipped"] == 0
    assert all(math.isfinite(v) for v in row["metrics"].values())
    assert row["utilisation"] > 0
