"""`crcm vbench-clips` of Wan: prompts in, clips and their origin out."""

import dataclasses
import json

import pytest
import tiny
import tiny_generation

from crcm_jax import cli, generation

pytestmark = pytest.mark.usefixtures("restore_logging")

WAN = ("--random-weights", "tiny", "--size", "48x32", "--frames", 9)
WAN += ("--pattern", "1,1", "--steps", "2,1")


def run(*words):
  with tiny.compile_fast():
    return cli.main(["vbench-clips", *map(str, words)])


@pytest.fixture
def asked(monkeypatch):
  """Draws the tiny networks once, and notes what is prepared."""
  asked = []
  drawn = dataclasses.replace(
    tiny_generation.networks(), prepare=lambda p: asked.append(list(p))
  )
  monkeypatch.setattr(generation, "random_networks", lambda size: drawn)
  return asked


def test_clips_of_wan_say_what_made_them(asked, tmp_path, capsys):
  pytest.importorskip("imageio_ffmpeg")
  prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
  prompts.write_text("a cat\na dog\n")
  rewrite = tmp_path / "longer.json"
  rewrite.write_text(json.dumps({"a dog": "a brown dog in the grass"}))
  words = (*WAN, "--prompts", prompts, "--out", out, "--rewrite", rewrite)
  assert run(*words) == 0
  names = [f"a {name}-{i}.mp4" for name in ("cat", "dog") for i in range(5)]
  clips = {path.name: path for path in (out / "videos").iterdir()}
  assert sorted(clips) == names
  contents = [clips[name].read_bytes() for name in names]
  assert len(set(contents)) == 10  # each seed and each prompt is another clip
  # The encoder is needed once, for the wordings and the negative prompt.
  assert asked == [["", "a cat", "a brown dog in the grass"]]
  made = json.loads((out / "run.json").read_text())
  assert made["checkpoint_sha256"] == "random tiny, seed 0"
  assert made["pattern"] == {"first": 1, "rest": 1}
  assert [len(times) for times in made["schedules"]] == [3, 2]
  assert (made["seeds"], made["frames"]) == ([0, 1, 2, 3, 4], 9)
  assert {"prompts_sha256", "rewrite_sha256", "guidance"} <= made.keys()

  clips["a dog-3.mp4"].unlink()  # as if it had been stopped there
  kept = clips["a cat-0.mp4"].stat().st_mtime_ns
  assert run(*words) == 0
  assert (
    clips["a dog-3.mp4"].read_bytes() == contents[names.index("a dog-3.mp4")]
  )
  assert clips["a cat-0.mp4"].stat().st_mtime_ns == kept
  assert run(*words, "--noisy-context") == 2
  assert "noisy_context was None, is 1" in capsys.readouterr().err


def test_clips_are_wans_or_a_workdirs(asked, tmp_path, capsys):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a cat\n")
  words = ("--prompts", prompts, "--out", tmp_path / "out")
  assert run(*words) == 2
  assert "name what to sample" in capsys.readouterr().err
  assert run("runs/x", *words, "--shift", 5) == 2
  assert "--shift must come with Wan's weights" in capsys.readouterr().err
  assert run(*WAN, *words, "--frames", 8) == 2
  assert "`frames` must be 4k + 1" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
