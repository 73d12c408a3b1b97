"""A step over eight devices is that of one, and sends what it must alone."""

import eight_devices
import parallel_moves
import parallel_steps
import pytest

MESHES = ("8x1x1x1", "1x8x1x1", "1x1x4x2", "2x2x2x1")
CASES = [
  # Parameters gathered, examples and tokens split, two streams.
  ("teacher_forcing", ("2x2x2x1",)),
  # A tangent; heads split, swapped and gathered.
  ("continuous_consistency", ("1x1x4x2",)),
  # Changed stages run where all axes and both ways of heads are, to be short.
  *(
    pytest.param(
      stage, MESHES[2:] if "," in stage else MESHES, marks=pytest.mark.slow
    )
    for stage in parallel_steps.STAGES
  ),
]


@pytest.mark.parametrize(("stage", "meshes"), CASES)
def test_a_step_over_a_mesh_equals_that_of_one_device(stage, meshes):
  rows = eight_devices.run("parallel_steps", stage, *meshes)
  phases = 1 + ("critic" in parallel_steps.STAGES[stage])
  assert len(rows) == phases * len(meshes)
  for row in rows:
    assert row["loss"] < 1e-5, row
    assert row["grads"] < 1e-5, row
    assert row["collectives"].pop("all-reduce") > 0
    moves = parallel_moves.collectives(stage, row["phase"], row["mesh"])
    assert row["collectives"] == moves, row


def test_the_moves_of_every_stage_are_known():
  assert parallel_moves.STEPS.keys() == parallel_steps.STAGES.keys()
  for stage, phases in parallel_moves.STEPS.items():
    critic = ["critic"] if "critic" in parallel_steps.STAGES[stage] else []
    assert [*phases] == ["student", *critic]
