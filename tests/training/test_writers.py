import json
import pathlib
import resource
import sys

import numpy as np
import pytest

from crcm_jax.training import _writers

CLIP = np.zeros((3, 8, 8, 1), np.float32)


def test_one_json_object_a_step_and_one_gif_a_clip(tmp_path):
  writer = _writers.Files(tmp_path)
  writer.scalars(1, {"loss": 0.5})
  writer.scalars(2, {"loss": float("nan")})
  writer.videos(2, {"digits": CLIP})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert json.loads(lines[0]) == {"step": 1, "loss": 0.5}
  assert np.isnan(json.loads(lines[1])["loss"])
  assert (tmp_path / "samples" / "digits_0000002.gif").stat().st_size > 0


def test_a_resumed_run_drops_the_steps_after_its_checkpoint(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
  writer = _writers.Files(tmp_path, from_step=2)
  writer.scalars(3, {"loss": 1.0})
  writer.close()
  rows = _writers.read_metrics(path)
  assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]


def test_each_kind_of_numbers_has_its_own_file_and_resumes(tmp_path):
  for from_step in (0, 1):
    writer = _writers.Files(tmp_path, from_step=from_step)
    for step in (1, 2)[from_step:]:
      for i, kind in enumerate(("metrics", "speed", "samples")):
        writer.scalars(step, {"x": 10.0 * from_step + i}, kind)
    writer.close()
  for i, kind in enumerate(("metrics", "speed", "samples")):
    assert _writers.read_metrics(tmp_path / f"{kind}.jsonl") == [
      {"step": 1, "x": i},
      {"step": 2, "x": 10 + i},
    ]


def test_tensorboard_gets_curves_and_strips(tmp_path):
  pytest.importorskip("tensorboardX")
  writer = _writers.Fanout([_writers.TensorBoard(tmp_path)])
  writer.scalars(1, {"loss": 0.5})
  writer.scalars(1, {"tokens": 3.0}, "speed")
  writer.videos(1, {"digits": CLIP})
  writer.close()
  (events,) = tmp_path.glob("events.*")
  content = events.read_bytes()
  assert b"loss" in content
  assert b"speed/tokens" in content
  assert b"digits" in content


def test_a_missing_extra_names_the_pip_command(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ImportError, match=r"pip install 'crcm_jax\[video\]'"):
    _writers.TensorBoard(tmp_path)


def test_a_full_disk_names_the_file(tmp_path):
  files = _writers.Files(tmp_path)
  files._files["metrics"].close()
  with pathlib.Path("/dev/full").open("w") as full:
    files._files["metrics"] = full
    with pytest.raises(OSError, match=r"No space left .*: '/dev/full'"):
      files.scalars(1, {"loss": 1.0})
    files.close()


def test_a_full_disk_stops_tensorboard_too(tmp_path):
  pytest.importorskip("tensorboardX")
  board = _writers.TensorBoard(tmp_path)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
  try:
    values = {f"loss{i}": 1.0 for i in range(100)}
    with pytest.raises(OSError, match=rf"too large: '{tmp_path}/events.*'"):
      board.scalars(1, values)
    board.close()  # says nothing more
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  board.close()


def test_a_kill_while_the_log_is_cut_leaves_the_old_one(tmp_path, monkeypatch):
  files = _writers.Files(tmp_path)
  for step in (1, 2):
    files.scalars(step, {"loss": 1.0})
  files.close()
  before = (tmp_path / "metrics.jsonl").read_text()

  def killed(path, target):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
      _writers.Files(tmp_path, from_step=1)
  assert (tmp_path / "metrics.jsonl").read_text() == before
  _writers.Files(tmp_path, from_step=1).close()
  (row,) = _writers.read_metrics(tmp_path / "metrics.jsonl")
  assert row["step"] == 1
