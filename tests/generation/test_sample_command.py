"""`crcm sample` for Wan, from words to files."""

import contextlib
import json
import logging

import pytest
import tiny
import tiny_generation

from crcm_jax import cli, generation

TINY = ("--random-weights", "tiny", "--size", "48x32", "--frames", 9)
FEW = ("--pattern", "1,1", "--steps", "2,1")


@pytest.fixture(autouse=True)
def _compile_fast():
  with tiny.compile_fast():
    yield


@pytest.fixture(autouse=True)
def _restore(monkeypatch):
  """Draws the tiny networks once, and restores logging."""
  drawn = tiny_generation.networks()
  monkeypatch.setattr(generation, "random_networks", lambda size: drawn)
  logger = logging.getLogger("crcm_jax")
  yield
  logger.handlers.clear()
  logger.propagate = True


def run(*words):
  with contextlib.suppress(SystemExit):
    return cli.main(["sample", *map(str, words)])
  return None


def test_one_clip(tmp_path, capsys):
  out = tmp_path / "a.mp4"
  assert run(*TINY, *FEW, "--prompt", "a cat", "--out", out) == 0
  shown = capsys.readouterr()
  assert f"{out}: first frame after" in shown.out
  assert "tiny, compiled: first frame after" in shown.out
  assert "frames/s end to end" in shown.out
  assert "by the transformer alone" in shown.out
  assert "9/9" in shown.err  # the progress bar
  record = json.loads((tmp_path / "a.json").read_text())
  assert (record["prompt"], record["height"], record["width"]) == (
    "a cat",
    32,
    48,
  )


def test_schedules_from_words(tmp_path):
  out = tmp_path / "a.mp4"
  words = ("--pattern", "1,1", "--mid-times", "5/8", "-", "--noisy-context")
  assert run(*TINY, *words, "--out", out, "--seed", 3) == 0
  record = json.loads((tmp_path / "a.json").read_text())
  assert [times[1:] for times in record["schedules"]] == [[0.625, 0], [0]]
  assert (record["noisy_context"], record["seed"]) == (1, 3)


def test_a_list_of_prompts_goes_on_where_it_was_stopped(tmp_path, capsys):
  prompts, out = tmp_path / "prompts.txt", tmp_path / "clips"
  prompts.write_text("a cat\na dog\na cow\n")
  words = (*TINY, *FEW, "--prompts", prompts, "--out", out)
  assert run(*words) == 0
  names = [f"{i:04}.{suffix}" for i in range(3) for suffix in ("json", "mp4")]
  assert sorted(path.name for path in out.iterdir()) == names
  (out / "0001.json").unlink()  # as if it had been stopped there
  kept = (out / "0000.mp4").stat().st_mtime_ns
  capsys.readouterr()
  assert run(*words) == 0
  shown = capsys.readouterr().out
  assert "2 of 3 clips are finished already." in shown
  assert "0001.mp4: first frame" in shown
  assert "0000.mp4: first" not in shown
  assert (out / "0000.mp4").stat().st_mtime_ns == kept
  assert run(*words) == 0
  assert "3 of 3 clips" in capsys.readouterr().out
  assert run(*words, "--seed", 1) == 2
  assert "was made with other seed" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ((), "name what to sample: one of SOURCE"),
    (("--prompt", "a"), "DIR holds: transformer (transformer or"),
    (("--prompt", "a"), "published as Wan-AI/Wan2.1-T2V-1.3B"),
    ((*TINY, *FEW, "--caption", "two"), "`--caption` must come with SOURCE"),
    (("runs/x", "--size", "64x64"), "--size must come with Wan's"),
    (("runs/x", *TINY), "name what to sample: one of SOURCE"),
    (("runs/x", "--noisy-context"), "--noisy-context must come with Wan's"),
    (("runs/x", "--steps", "4,2"), "several --steps must come with Wan's"),
    ((*TINY, *FEW, "--frames", 0), "`frames` must be 4k + 1"),
    (("--weights", "/nowhere", "--prompt", "a"), "lacks: transformer"),
    (("--weights", "/nowhere"), "`--prompt` must say what to show"),
    ((*TINY, *FEW, "--size", "40x32"), "`width` must be divisible by 16"),
    ((*TINY, *FEW, "--frames", 8), "`frames` must be 4k + 1"),
    ((*TINY, "--pattern", "3,3", "--frames", 13), "fill whole chunks"),
    ((*TINY, "--steps", "4,2"), "`steps` must be one number for unipc"),
    ((*TINY, *FEW, "--prompts", "empty.txt"), "line 2 is empty"),
    ((*TINY, *FEW, "--image", "empty.png"), "of 0 bytes, is not"),
    ((*TINY, *FEW, "--out", "no/a.mp4"), "folder that exists"),
    ((*TINY, *FEW, "--out", "a.avi"), "must end in one of"),
  ],
  ids=str,
)
def test_bad_input_is_named_and_leaves_nothing(
  words, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty.txt").write_text("a cat\n\na dog\n")
  (tmp_path / "empty.png").touch()
  assert run("--out", "a.mp4", *words) == 2
  assert message in capsys.readouterr().err
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "empty.png",
    "empty.txt",
  ]


def test_words_that_are_no_numbers(capsys):
  assert run(*TINY, "--pattern", "3", "--out", "a.mp4") is None
  assert "--pattern: invalid" in capsys.readouterr().err
  assert run(*TINY, "--size", "big", "--out", "a.mp4") is None
  assert "--size: invalid" in capsys.readouterr().err
