"""Runs the test file that users copy, and breaks its model to see it fail."""

import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
FILE = ROOT / "examples" / "test_my_model.py"
TESTS = {
  name: test
  for name, test in runpy.run_path(str(FILE)).items()
  if name.startswith("test_")
}


@pytest.mark.parametrize("name", TESTS)
def test_the_example_passes(name):
  TESTS[name]()


@pytest.mark.parametrize(
  ("right", "wrong", "name"),
  [
    (
      "return jnp.tanh(h)",
      "return jax.lax.stop_gradient(h)",
      "test_the_tangent_is_right_and_precise_enough",
    ),
    (
      "chunk[:, None] > chunk",
      "chunk[:, None] >= chunk",
      "test_no_chunk_sees_its_own_clean_frames_or_later_ones",
    ),
    (
      "cache.frames + x.shape[1]",
      "cache.frames + 1",
      "test_the_cache_gives_what_training_gave",
    ),
    (
      "    velocity, params, teacher, x_0, noise, t\n",
      "    velocity, params, teacher, x_0, noise, t * t.mean()\n",
      "test_the_loss_ignores_the_rest_of_the_batch",
    ),
    (
      "    velocity, params, teacher, x_0, noise, t\n",
      "    velocity, params, teacher, x_0, noise, t, tangent_weight=0.9\n",
      "test_the_loss_vanishes_at_the_true_consistency_function",
    ),
  ],
)
def test_the_example_catches_a_broken_model(right, wrong, name):
  code = FILE.read_text()
  assert code.count(right) == 1
  namespace = {}
  exec(compile(code.replace(right, wrong), "my_model", "exec"), namespace)
  with pytest.raises(AssertionError):
    namespace[name]()
