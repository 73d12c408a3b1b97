"""Two runs beside each other: every number of either is drawn."""

import importlib.util
import json
import pathlib
import re
import xml.etree.ElementTree as ET

import pytest

from crcm_jax.evaluation import _plots

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture
def compare():
  path = ROOT / "benchmarks" / "compare_runs.py"
  spec = importlib.util.spec_from_file_location("compare_runs", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def write(folder, rows, kind="metrics", **config):
  folder.mkdir(parents=True, exist_ok=True)
  lines = (json.dumps({"step": i, **row}) + "\n" for i, row in enumerate(rows))
  (folder / f"{kind}.jsonl").write_text("".join(lines))
  (folder / "config.json").write_text(json.dumps(config))


def points(svg, style):
  """The vertices of the line with a class."""
  for line in ET.fromstring(svg).iter("polyline"):
    if line.get("class") == style:
      pairs = (p.split(",") for p in line.get("points").split())
      return [(float(x), float(y)) for x, y in pairs]
  raise AssertionError(f"no line {style}")


def test_both_runs_share_the_axes():
  svg = _plots.compare_chart(
    {"a": ([0, 10], [0.0, 1.0]), "b": ([0, 5], [1.0, 0.0])}
  )
  a, b = points(svg, "raw"), points(svg, "raw other")
  assert a[0][1] == b[1][1]  # both 0
  assert a[1][1] == b[0][1]  # both 1
  assert a[0][0] == b[0][0]
  assert b[1][0] == pytest.approx((a[0][0] + a[1][0]) / 2, abs=0.1)
  label = ET.fromstring(svg).get("aria-label")
  assert label == "a: 0 at step 0, 1 at step 10; b: 1 at step 0, 0 at step 5"


def test_a_run_without_the_metric_leaves_the_others_line():
  svg = _plots.compare_chart({"a": ([], []), "b": ([0, 1], [1.0, 2.0])})
  assert "raw other" in svg
  assert 'class="raw"' not in svg


def test_the_page_has_a_chart_and_a_row_for_each_number(compare, tmp_path):
  write(tmp_path / "a", [{"loss": 1.0, "<old>": 2.0}] * 20, lr=0.1, seed=0)
  write(tmp_path / "a", [{"tokens": 5.0}] * 20, "speed", lr=0.1, seed=0)
  write(tmp_path / "b", [{"loss": 3.0}] * 10 + [{"loss": 2.0}], lr=0.2, seed=0)
  out = compare.main(
    [
      str(tmp_path / "a"),
      str(tmp_path / "b"),
      "--out",
      str(tmp_path / "c.html"),
    ]
  )
  page = out.read_text()
  assert page.count("<svg") == 3
  assert "`stage.lr`: 0.1 -&gt; 0.2" in page
  assert "seed" not in page
  cells = re.findall(r"<tr><td>(.*?)</td></tr>", page)
  assert [cell.split("</td><td>") for cell in cells] == [
    ["metrics/loss", "1", "2", "2"],
    ["metrics/&lt;old&gt;", "2", "–", "–"],
    ["speed/tokens", "5", "–", "–"],
  ]


def test_an_experiment_is_the_stages_in_it(compare, tmp_path):
  write(tmp_path / "a" / "teacher", [{"loss": 1.0}])
  write(tmp_path / "a" / "student", [{"loss": 1.0}])
  run = compare.read_run(tmp_path / "a", "a")
  assert list(run.curves) == ["student/metrics/loss", "teacher/metrics/loss"]


def test_runs_are_named_by_what_tells_them_apart(compare):
  path = pathlib.Path
  assert compare.names_of(path("x/a"), path("x/b")) == ("a", "b")
  assert compare.names_of(path("x/a/s"), path("x/b/s")) == ("a/s", "b/s")
  assert compare.names_of(path("s"), path("s"))[1].endswith("s (second)")


def test_a_folder_without_a_run_is_named(compare, tmp_path):
  with pytest.raises(SystemExit, match=r"a run must be a workdir of `crcm tra"):
    compare.main([str(tmp_path), str(tmp_path)])
