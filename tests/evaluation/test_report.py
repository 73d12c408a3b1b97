"""The report is one well-formed page that needs nothing else."""

import base64
import datetime
import html.parser
import io
import json

import imageio.v3 as imageio
import numpy as np
import pytest

from crcm_jax import evaluation
from crcm_jax.evaluation import _plots

VOID = {"meta", "img", "source", "line", "polyline"}


class _Page(html.parser.HTMLParser):
  """Collects texts and attributes; fails on tags that do not nest."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, text):
    self.texts.append((self.open[-1] if self.open else "", text))

  def all(self, tag):
    return [attrs for name, attrs in self.tags if name == tag]

  def text(self, tag):
    return [text for name, text in self.texts if name == tag]


@pytest.fixture
def results():
  video = np.random.default_rng(0).integers(0, 255, (2, 5, 32, 32), np.uint8)
  return evaluation.Results(
    rows={
      "real": {"frechet": 0.5, "digit_accuracy": 99.0, "diversity": 4.0},
      "teacher, 50 steps": {"frechet": 1.25, "digit_accuracy": 90.0},
      "student <2>": {"frechet": 2.5, "digit_accuracy": 91.0, "diversity": 5.0},
      "failed": {"frechet": float("nan")},
    },
    captions=["two moving up", "one & only <b>"],
    videos={"real": video, "student <2>": video[:1]},
    settings={"num_clips": 8},
  )


@pytest.fixture
def page(results, tmp_path):
  steps = [{"step": i, "loss": 2.0 / (i + 1), "lr": 1.0} for i in range(50)]
  critic = [{"step": 1, "critic/loss": float("nan")}, {"step": 2, "lr": 1.0}]
  path = evaluation.write_report(
    tmp_path / "report.html",
    results,
    command="crcm train --config a.py:<x>",
    config={"seed": 1},
    curves={"tf_scm": steps, "self_forcing": critic, "absent": []},
    device="a device",
    date=datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
  )
  return _Page(path.read_text())


def test_page_needs_nothing_from_outside(page):
  assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
  for _, attrs in page.tags:
    assert "href" not in attrs
    for name in ("src", "srcset"):
      assert attrs.get(name, "data:").startswith("data:")
  (style,) = page.text("style")
  assert "url(" not in style
  assert "@import" not in style


def test_videos_are_embedded_whole_and_described(page, results):
  pictures = page.all("img")
  assert len(pictures) == 3
  assert all(picture["alt"] for picture in pictures)
  data = base64.b64decode(pictures[0]["src"].split(",")[1])
  frames = imageio.imread(io.BytesIO(data), index=None)
  wanted = results.videos["real"][0]
  np.testing.assert_array_equal(frames[..., 0], wanted)


def test_missing_videos_and_metrics_leave_their_place_empty(page):
  assert page.text("div").count("no video") == 5
  assert page.text("td").count("–") == 4
  assert page.text("figcaption").count("failed") == 2


def test_best_sampler_of_each_column_is_bold(page):
  assert page.text("b") == ["1.25", "91", "5"]


def test_captions_and_commands_are_escaped(page):
  assert "“one & only <b>”" in page.text("h3")
  assert "crcm train --config a.py:<x>" in page.text("code")
  assert '{\n  "seed": 1\n}' in page.text("code")


def test_header_tells_device_and_date(page):
  assert any("a device" in text for text in page.text("p"))
  assert page.text("time") == ["2026-01-02 03:04 UTC"]


def test_losses_are_drawn_and_nothing_else(page):
  assert "tf_scm: loss" in page.text("figcaption")
  assert len(page.all("svg")) == 1
  assert "No finite value was logged." in page.text("p")
  assert not any("lr" in text for text in page.text("figcaption"))


def test_numbers_lie_beside_the_page(results, tmp_path):
  evaluation.write_report(
    tmp_path / "report.html", results, command="", config=""
  )
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "report.html",
    "report.json",
  ]
  record = json.loads((tmp_path / "report.json").read_text())
  assert record["rows"]["failed"] == {"frechet": None}


def test_report_without_examples_and_curves(tmp_path):
  results = evaluation.Results(rows={}, captions=[], videos={}, settings={})
  path = evaluation.write_report(
    tmp_path / "r.html", results, command="", config=""
  )
  assert _Page(path.read_text()).all("svg") == []


def test_chart_says_its_first_and_last_value():
  chart = _plots.line_chart(
    [0.0, 1.0, 2.0], [4.0, float("inf"), 1.0], name="a <loss>"
  )
  (svg,) = _Page(chart).all("svg")
  assert svg["aria-label"] == "a <loss>: 4 at step 0, 1 at step 2"


@pytest.mark.parametrize(
  "values", [[1.0], [0.0, 0.0], [-1.0, 3.0], [1e-6, 1e3], [2.0, 2.0]]
)
def test_charts_stay_inside_their_frame(values):
  steps = [float(i) for i in range(len(values))]
  chart = _plots.line_chart(steps, values, name="loss")
  for line in _Page(chart).all("polyline"):
    points = [p.split(",") for p in line["points"].split()]
    assert all(0 <= float(x) <= 420 and 0 <= float(y) <= 220 for x, y in points)
