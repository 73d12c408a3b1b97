"""The benchmark runs at tiny size, and measures all it says."""

import importlib.util
import json
import math
import pathlib

import pytest
import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def benchmark():
  path = ROOT / "benchmarks" / "sample_wan.py"
  spec = importlib.util.spec_from_file_location("sample_wan", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_benchmark_measures_all_it_says(benchmark, tmp_path, capsys):
  with tiny.compile_fast():
    report = benchmark.main(["--tiny", "--json", str(tmp_path / "rows.json")])
  rows, table = report.rows, json.loads((tmp_path / "rows.json").read_text())
  assert table["failed"] == []
  written = table["rows"]
  assert [row["what"] for row in written] == [row.what for row in rows]
  shown = capsys.readouterr().out
  for case in ("1,1 [4,2,2,...]", "3,3 [4,4,...]"):
    measured = {row.what: row for row in rows if row.case == case}
    for what in (
      "first frame, s",
      "frames/s, end to end",
      "frames/s, transformer alone",
      "compiling, s",
      "ms a call, 0 frames seen",
      "ms a call, mean over the clip",
    ):
      value = measured[what].value
      assert math.isfinite(value)
      assert value > 0
      assert f"{what:<34}{value:>10.4g}" in shown
    assert measured["programs compiled in a later clip"].value == 0
  assert "ms a decoded RGB frame" in shown
  assert f"{4.5:>10}{15:>10}{20:>10}" in shown
  limits = [row.limit for row in rows if row.limit is not None]
  assert limits == [21, 62, 4.5]


def test_what_fails_does_not_take_the_rest_along(
  benchmark, tmp_path, monkeypatch, capsys
):
  def fail(*_):
    raise RuntimeError("no memory left")

  for part in ("measure_vae", "measure_clips", "measure_calls"):
    monkeypatch.setattr(benchmark, part, fail)
  with tiny.compile_fast():
    report = benchmark.main(["--tiny", "--json", str(tmp_path / "rows.json")])
  assert "RuntimeError: no memory left" in capsys.readouterr().err
  table = json.loads((tmp_path / "rows.json").read_text())
  assert table["failed"] == report.failed
  calls, clips = (
    [f"{case.name}, {part}" for case in benchmark.CASES]
    for part in ("calls", "clips")
  )
  assert report.failed == [*calls, "decoder", *clips]
  assert [row["what"] for row in table["rows"]].count("compiling, s") == 2
