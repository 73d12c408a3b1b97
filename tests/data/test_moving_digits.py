import pathlib
import subprocess
import sys

import numpy as np
import pytest

from crcm_jax import data

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_builder_is_a_tfds_dataset(builder):
  assert builder.info.full_name.startswith("moving_digits/grey.frames-12")
  assert builder.info.splits["train"].num_examples == 44
  assert builder.info.splits["test"].num_examples == 20
  assert "Alpaydin" in builder.info.citation


def test_files_hold_the_clips_that_make_clip_makes(builder):
  stored = {}
  for clip in builder.as_data_source("test"):
    stored[clip["video"].tobytes()] = clip
  assert len(stored) == 20
  for index in range(20):
    made = data.make_clip(index, split="test", frames=12)
    clip = stored[made.video.tobytes()]
    assert clip["caption"].decode() == made.caption
    for name, label in made.labels._asdict().items():
      np.testing.assert_array_equal(clip[name], label)


def test_prepared_files_are_used_again(builder):
  folder = pathlib.Path(builder.data_path)
  before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
  data.prepare_moving_digits(
    folder.parent.parent.parent, frames=12, train_clips=44, test_clips=20
  )
  assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_usual_settings_are_registered_under_short_names():
  from crcm_jax.data import moving_digits

  assert list(moving_digits.MovingDigits.builder_configs) == ["grey", "rgb"]
  assert moving_digits.MovingDigitsConfig().name == "grey"
  assert moving_digits.MovingDigitsConfig(seed=3).name == "grey.seed-3"


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"channels": 2}, "`channels` must be 1 .* got 2"),
    ({"frames": 0}, "`frames` must be at least 1; got 0"),
    ({"train_clips": 0}, "`train_clips` must be at least 1; got 0"),
  ],
)
def test_settings_out_of_range_say_so(setting, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    data.prepare_moving_digits(tmp_path, **setting)


def run_python(program, *args):
  command = [sys.executable, "-W", "error", "-c", program, *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_reading_and_writing_need_no_tensorflow(tmp_path):
  program = """
import sys
from crcm_jax import data
builder = data.prepare_moving_digits(sys.argv[1], train_clips=4, test_clips=1)
batches = data.moving_digits_batches(
  builder, split="train", batch_size=2, frames=3)
print(next(batches).x_0.shape[0])
print("tensorflow" in sys.modules)
"""
  assert run_python(program, str(tmp_path)) == ["2", "False"]


def test_importing_the_package_needs_no_extra():
  program = """
import sys
import crcm_jax.data
extras = {"tensorflow_datasets", "grain", "sklearn", "array_record"}
print(*extras & set(sys.modules))
"""
  assert run_python(program) == []
