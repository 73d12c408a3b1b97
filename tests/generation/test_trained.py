"""Weights are sampled as they were trained to be."""

import pytest

from crcm_jax.chunks import ChunkPattern
from crcm_jax.generation import check_trained, Settings, trained_pattern

SINGLE = ChunkPattern(1, 1)
TWO = dict(pattern=SINGLE, steps=(4, 2))
ABOUT = {
  "pattern": {"first": 1, "rest": 1},
  "sampling": {
    "mid_times": {
      "4": [[0.9375, 5 / 6, 0.625], [5 / 6]],
      "1": [[]],
    },
    "context": "clean",
  },
}
NOISY = {"sampling": {"context": "last_step", "context_start": 1}}


def test_what_fits():
  check_trained(ABOUT, Settings(**TWO))
  check_trained(ABOUT, Settings(pattern=SINGLE, steps=(1,)))
  check_trained(ABOUT, Settings(pattern=SINGLE, steps=(1, 1)))
  check_trained(NOISY, Settings(**TWO, noisy_context=1))
  check_trained({}, Settings(**TWO))
  check_trained(ABOUT, Settings(pattern=SINGLE, solver="euler"))
  assert trained_pattern(ABOUT) == SINGLE
  assert trained_pattern({}) is None


@pytest.mark.parametrize(
  ("about", "settings", "message"),
  [
    (ABOUT, dict(TWO, pattern=ChunkPattern(3, 3)), "their pattern is"),
    (ABOUT, {}, "their pattern is"),
    (ABOUT, dict(TWO, steps=(4,)), "times between the first and 0 are"),
    (ABOUT, dict(TWO, steps=(2,)), "they have times for 4, 1 steps"),
    (ABOUT, dict(TWO, noisy_context=1), "starts at chunk None, not 1"),
    (NOISY, TWO, "starts at chunk 1, not None"),
  ],
  ids=["pattern", "whole", "later", "number", "noisy", "clean"],
)
def test_what_does_not_fit(about, settings, message):
  with pytest.raises(ValueError, match=message):
    check_trained(about, Settings(**settings))
