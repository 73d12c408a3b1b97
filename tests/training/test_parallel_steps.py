"""A step over eight devices is that of one, and sends what it must alone."""

import eight_devices
import parallel_steps
import pytest

MESHES = ("8x1x1x1", "1x8x1x1", "1x1x4x2", "2x2x2x1")
CASES = [
  # Parameters gathered, examples and tokens split, two streams.
  ("teacher_forcing", ("2x2x2x1",)),
  # A tangent; heads split, swapped and gathered.
  ("continuous_consistency", ("1x1x4x2",)),
  *(
    pytest.param(
      stage, ("2x2x2x1",) if "," in stage else MESHES, marks=pytest.mark.slow
    )
    for stage in parallel_steps.STAGES
  ),
]

MOVES = {
  # Examples: gradients are summed.
  ("teacher_forcing", "8x1x1x1"): {},
  # The ten matrices of a layer, gathered forward and backward.
  ("teacher_forcing", "1x8x1x1"): {"all-gather": 20},
  # And the velocity's patches. q, k, v, o of two streams; backward the two
  # outputs and queries, and keys and values thrice: the clean ones' cotangents
  # come from their own stream and, as context, from the noisy one.
  ("teacher_forcing", "2x2x2x1"): {"all-gather": 21, "all-to-all": 18},
  # No matrices. Of 6 heads on 4 devices, keys and values of both streams are
  # gathered by pairs, whose gradient is a reduce-scatter; and the patches.
  ("teacher_forcing", "1x1x4x2"): {
    "all-gather": 5,
    "all-to-all": 18,
    "reduce-scatter": 6,
  },
}
"""What moves data, by stage and mesh; all-reduces sum, as XLA joins them."""


@pytest.mark.parametrize(("stage", "meshes"), CASES)
def test_a_step_over_a_mesh_equals_that_of_one_device(stage, meshes):
  rows = eight_devices.run("parallel_steps", stage, *meshes)
  phases = 1 + ("critic" in parallel_steps.STAGES[stage])
  assert len(rows) == phases * len(meshes)
  for row in rows:
    assert row["loss"] < 1e-5, row
    assert row["grads"] < 1e-5, row
    assert row["collectives"].pop("all-reduce") > 0
    assert "collective-permute" not in row["collectives"], row
    if (case := (stage, row["mesh"])) in MOVES:
      assert row["collectives"] == MOVES[case]
