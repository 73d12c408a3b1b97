"""VBench's scores against published ones; the clips and files it reads."""

import json

import numpy as np
import pytest

from crcm_jax import cli, evaluation
from crcm_jax.evaluation import _vbench

pytestmark = pytest.mark.usefixtures("restore_logging")

# HunyuanVideo on VBench's leaderboard, in percent, in the order of
# VBENCH_DIMENSIONS: https://huggingface.co/spaces/Vchitect/VBench_Leaderboard.
# Its total and its dynamic degree are also quoted in
# https://github.com/Vchitect/VBench/issues/122.
HUNYUAN = (
  *(97.37, 97.76, 99.44, 98.99, 70.83, 60.36, 67.56),
  *(86.10, 68.55, 94.40, 91.60, 68.68, 53.88, 19.80, 23.89, 26.44),
)
PUBLISHED = dict(total=83.24, quality=85.09, semantic=75.82)


def hunyuan():
  shares = [score / 100 for score in HUNYUAN]
  return dict(zip(evaluation.VBENCH_DIMENSIONS, shares, strict=True))


def test_published_totals():
  got = evaluation.vbench_scores(hunyuan())._asdict()
  assert {name: round(100 * s, 2) for name, s in got.items()} == PUBLISHED


def test_every_dimension_counts_by_its_weight():
  before = evaluation.vbench_scores(hunyuan())
  for name in evaluation.VBENCH_DIMENSIONS:
    after = evaluation.vbench_scores(hunyuan() | {name: 0.1})
    if name in _vbench.QUALITY:
      assert after.semantic == before.semantic
      assert after.quality < before.quality
    else:
      assert after.quality == before.quality
      assert after.semantic < before.semantic
  halved = evaluation.vbench_scores(hunyuan() | {"dynamic_degree": 0.0})
  assert before.quality - halved.quality == pytest.approx(0.7083 * 0.5 / 6.5)
  assert before.total - halved.total == pytest.approx(0.7083 * 0.4 / 6.5)


def test_the_best_scores_are_one():
  best = {
    name: part.high
    for name, part in (_vbench.QUALITY | _vbench.SEMANTIC).items()
  }
  assert evaluation.vbench_scores(best) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"scene": None}, r"missing \['scene'\], unknown none"),
    ({"scenery": 0.5}, r"missing none, unknown \['scenery'\]"),
    ({"scene": 53.88}, r"'scene'.*must lie in \[0, 1\]; got 53.88"),
    ({"scene": float("nan")}, r"must lie in \[0, 1\]; got nan"),
  ],
)
def test_scores_that_cannot_be_compared(changes, message):
  scores = {k: v for k, v in (hunyuan() | changes).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    evaluation.vbench_scores(scores)


def results(folder, scores, name="a"):
  path = folder / f"{name}_eval_results.json"
  entry = lambda s: [s, [{"video_path": "x.mp4", "video_results": s}]]
  path.write_text(json.dumps({k: entry(s) for k, s in scores.items()}))
  return path


def test_results_in_one_file_or_many(tmp_path):
  parts = list(hunyuan().items())
  for i, part in enumerate(parts):
    results(tmp_path, dict([part]), name=f"run_{i}")
  assert evaluation.read_vbench_results([tmp_path]) == hunyuan()
  again = results(tmp_path, {"scene": 0.1}, name="other")
  with pytest.raises(ValueError, match="an earlier file"):
    evaluation.read_vbench_results([tmp_path])
  again.write_text("<html>")
  with pytest.raises(ValueError, match="must be results of VBench"):
    evaluation.read_vbench_results([again])
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match=r"has no \*_eval_results"):
    evaluation.read_vbench_results([tmp_path / "empty"])


INFO = [
  {"prompt_en": "a person", "dimension": ["human_action"]},
  {"prompt_en": "a red cat", "dimension": ["color"],
   "auxiliary_info": {"color": {"color": "red"}}},
  {"prompt_en": "a person", "dimension": ["dynamic_degree"]},
]  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "VBench_full_info.json"
  path.write_text(json.dumps(INFO))
  return evaluation.read_vbench_prompts(path)


class Maker:
  """Makes grey clips, remembers of what, and may break off."""

  def __init__(self, stop=None):
    self.calls, self._stop = [], stop

  def __call__(self, prompt, seed):
    if len(self.calls) == self._stop:
      raise KeyboardInterrupt
    self.calls.append((prompt, seed))
    return np.full((2, 16, 16, 3), seed / 10, np.float32)


def test_clips_for_vbench_are_resumed(tmp_path, prompts):
  pytest.importorskip("imageio_ffmpeg")
  out, record = tmp_path / "out", {"pattern": [1, 3]}
  write = lambda make, **more: evaluation.write_vbench_clips(
    make, prompts, out, record=record, **more
  )
  first = Maker(stop=3)
  with pytest.raises(KeyboardInterrupt):
    write(first)
  assert not (out / "vbench_eval_info.json").exists()
  (out / "videos" / ".a person-3.mp4.1.unfinished").write_bytes(b"")
  second = Maker()
  info = write(second)
  wanted = [(p, seed) for p in ("a person", "a red cat") for seed in range(5)]
  assert first.calls + second.calls == wanted
  names = sorted(path.name for path in (out / "videos").iterdir())
  assert names == sorted(f"{prompt}-{i}.mp4" for prompt, i in wanted)

  entries = json.loads(info.read_text())
  assert [{**e, "video_list": 0} for e in entries] == [
    {**e, "video_list": 0} for e in INFO
  ]
  for entry in entries:
    clips = [f"{entry['prompt_en']}-{i}.mp4" for i in range(5)]
    assert entry["video_list"] == [str(out / "videos" / c) for c in clips]
  run = json.loads((out / "run.json").read_text())
  assert run["prompts_sha256"] == prompts.sha256
  assert run["seeds"] == [0, 1, 2, 3, 4]
  assert run["pattern"] == [1, 3]

  with pytest.raises(ValueError, match="`seeds` must hold at least one"):
    write(Maker(), seeds=())
  third = Maker()
  write(third)
  assert third.calls == []
  record["pattern"] = (3, 3)
  with pytest.raises(ValueError, match=r"pattern was \[1, 3\], is \[3, 3\]"):
    write(third)


def test_prompts_may_be_reworded(tmp_path, prompts):
  pytest.importorskip("imageio_ffmpeg")
  make, path = Maker(), tmp_path / "rewrite.json"
  write = lambda: evaluation.write_vbench_clips(
    make,
    prompts,
    tmp_path / "out",
    record={},
    seeds=(7,),
    rewrite=evaluation.read_rewrite(path),
  )
  path.write_text('{"a red dog": "a dog"}')
  with pytest.raises(ValueError, match=r"\['a red dog'\] are none"):
    write()
  for wrong in ("[]", '{"a red cat": ""}', "<html>"):
    path.write_text(wrong)
    with pytest.raises(ValueError, match="must hold an object"):
      write()
  path.write_text('{"a red cat": "a red cat, at night"}')
  write()
  assert make.calls == [("a person", 7), ("a red cat, at night", 7)]
  assert (tmp_path / "out" / "videos" / "a red cat-0.mp4").exists()


def test_a_text_of_prompts(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("a cat\na dog\n")
  prompts = evaluation.read_vbench_prompts(path)
  assert prompts.prompts == ["a cat", "a dog"]
  assert "imaging_quality" in prompts.entries[0]["dimension"]
  assert "color" not in prompts.entries[0]["dimension"]


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("p.txt", "a cat\n\na dog\n", "line 2 .* is empty"),
    ("p.txt", "", "line 1 .* is empty"),
    ("p.txt", "a cat/dog\n", "'a cat/dog' .* has a '/'"),
    ("p.txt", "x" * 300, "longer than 223 bytes"),
    ("p.txt", "...\n", "begins with '.'"),
    ("p.json", "<html>", "must be JSON"),
    ("p.json", "[]", "must hold a list"),
    ("p.json", '[{"prompt_en": "a"}]', "entry 0"),
  ],
)
def test_prompts_that_cannot_be_used(tmp_path, name, text, message):
  path = tmp_path / name
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    evaluation.read_vbench_prompts(path)


def test_scores_from_the_command_line(tmp_path, prompts, capsys):
  pytest.importorskip("imageio_ffmpeg")
  out = tmp_path / "out"
  found = results(tmp_path, hunyuan())
  words = ["vbench-score", str(out), str(found)]
  assert cli.main(words) == 2
  assert "has no vbench_eval_info.json" in capsys.readouterr().err
  record = {"checkpoint_sha256": "abc"}
  evaluation.write_vbench_clips(
    Maker(), prompts, out, record=record, seeds=(0,)
  )
  assert cli.main(words) == 0
  assert "83.24 %" in capsys.readouterr().out
  scores = json.loads((out / "vbench_scores.json").read_text())
  assert scores["total"] == pytest.approx(0.8324, abs=5e-5)
  assert scores["dimensions"] == hunyuan()
  assert scores["run"]["checkpoint_sha256"] == "abc"
  assert scores["run"]["prompts_sha256"] == prompts.sha256
