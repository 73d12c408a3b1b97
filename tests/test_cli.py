"""The command line, from help to a whole tiny experiment."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_wan

from crcm_jax import cli, models, training

ROOT = pathlib.Path(__file__).parent.parent
DIGITS = str(ROOT / "experiments" / "configs" / "moving_digits.py")

pytestmark = pytest.mark.usefixtures("restore_logging")

# From scratch, but bidirectional parameters start the student at once.
SHORT = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("digits", {DIGITS!r})
digits = importlib.util.module_from_spec(spec)
spec.loader.exec_module(digits)

def get_config():
  config = digits.get_config("runlocal")
  with config.unlocked():
    del config.causal, config.consistency
    config.stages = ("bidirectional", "self_forcing")
    config.self_forcing.init.student = "bidirectional"
    config.network.layers = 1
    config.loop.sample_every = 0
    config.evaluation.num_examples = 1
  return config
"""


@pytest.fixture
def _compile_fast():
  with tiny.compile_fast():
    yield


def run(*words):
  with contextlib.suppress(SystemExit):
    return cli.main([str(word) for word in words])
  return None


@pytest.mark.parametrize(
  "command",
  [
    *("train", "sample", "evaluate", "export", "convert", "encode"),
    *("vbench-clips", "vbench-score", "print-config"),
  ],
)
def test_help_shows_examples(command, capsys):
  run(command, "--help")
  shown = capsys.readouterr().out
  assert f"usage: crcm {command}" in shown
  assert f"examples:\n  crcm {command} " in shown


def test_help_lists_the_commands(capsys):
  run("--help")
  shown = capsys.readouterr().out
  for line in (
    "Trains all stages",
    "Generates one clip",
    "Scores the networks",
  ):
    assert line in shown


def test_print_config_applies_changes(capsys):
  assert run("print-config", "--config", DIGITS, "--config.seed=7") == 0
  assert "seed: 7" in capsys.readouterr().out


def test_an_unknown_key_names_the_nearest(capsys):
  assert run("print-config", "--config", DIGITS, "--config.sede=7") == 2
  assert "did you mean `seed`?" in capsys.readouterr().err


def test_an_unknown_argument_is_refused(capsys):
  run("evaluate", "runs/x", "--sede")
  assert "unrecognized arguments: --sede" in capsys.readouterr().err
  run("evaluate", "runs/x", "--config.seed=1")
  assert "take --config.KEY=VALUE" in capsys.readouterr().err


def test_an_unknown_stage_and_workdir_are_named(tmp_path, capsys):
  words = ("train", "--config", DIGITS, "--workdir", tmp_path)
  assert run(*words, "--stage", "causl") == 2
  assert "must be one of ['consistency'" in capsys.readouterr().err
  assert run("evaluate", tmp_path) == 2
  assert "has no experiment.json" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_run_that_was_stopped_and_saved(
  tmp_path, capsys, monkeypatch, number, status
):
  def stop(stage, folders):
    raise training.Interrupted("stopped and saved at step 7", number)

  monkeypatch.setattr(training, "train_stage", stop)
  assert run("train", "--config", DIGITS, "--workdir", tmp_path) == status
  assert "crcm: stopped and saved at step 7" in capsys.readouterr().err


def test_sigterm_while_there_is_nothing_to_save(tmp_path, capsys, monkeypatch):
  before = signal.getsignal(signal.SIGTERM)
  kill = lambda stage, folders: os.kill(os.getpid(), signal.SIGTERM)
  monkeypatch.setattr(training, "train_stage", kill)
  assert run("train", "--config", DIGITS, "--workdir", tmp_path) == 0
  assert "stopped, with nothing new to save" in capsys.readouterr().err
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("_compile_fast")
def test_a_refused_command_changes_nothing(tmp_path, capsys):
  config, workdir = tmp_path / "tiny.py", tmp_path / "run"
  config.write_text(
    "import ml_collections\n"
    "def get_config(): return ml_collections.ConfigDict("
    f"{tiny.config(diffusion=tiny.DIFFUSION | dict(steps=2))})\n"
  )
  train = ("train", "--config", config, "--workdir", workdir)
  assert run(*train) == 0
  # Another process is just writing a checkpoint there.
  (workdir / "diffusion" / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
  content = lambda: {
    path: path.is_file() and path.read_bytes() for path in workdir.rglob("*")
  }
  before = content()
  assert run(*train, "--config.seed=5") == 2
  assert "differs in `seed`" in capsys.readouterr().err
  assert content() == before


@pytest.mark.usefixtures("_compile_fast")
def test_an_experiment_from_one_command_to_report_and_video(tmp_path, capsys):
  pytest.importorskip("tensorflow_datasets")
  config, workdir = tmp_path / "short.py", tmp_path / "run"
  config.write_text(SHORT)
  train = ("train", "--config", config, "--workdir", workdir)
  train += ("--data_dir", tmp_path / "data")
  assert run(*train) == 0
  shown = capsys.readouterr()
  assert f"The report is {workdir / 'report.html'}" in shown.out
  rows = json.loads((workdir / "report.json").read_text())["rows"]
  assert {"real", "self_forcing, 2 steps"} <= rows.keys()
  assert "self_forcing: 100%" in shown.err

  clip, weights = tmp_path / "clip.gif", tmp_path / "w" / "student.safetensors"
  assert run("sample", workdir, "--out", clip, "--steps", 2) == 0
  assert clip.read_bytes().startswith(b"GIF")
  assert run("export", workdir / "self_forcing", "--out", weights) == 0
  about = json.loads(weights.with_suffix(".json").read_text())
  assert about["stage"] == "self_forcing"
  assert about["command"].startswith("crcm train --config")
  clips = ("vbench-clips", weights, "--prompts", tmp_path / "prompts.txt")
  clips += ("--seeds", 2, "--out", tmp_path / "vbench", "--steps", 2)
  (tmp_path / "prompts.txt").write_text("seven moving left, fast\n")
  assert run(*clips) == 0
  assert len(list((tmp_path / "vbench" / "videos").glob("seven*.mp4"))) == 2
  made = json.loads((tmp_path / "vbench" / "run.json").read_text())
  assert made["schedule"]["steps"] == 2
  assert made["pattern"] == about["pattern"]
  assert len(made["checkpoint_sha256"]) == 64
  assert run(*clips[:-1], 4) == 2  # another schedule
  assert "schedule was" in capsys.readouterr().err
  assert run("sample", weights, "--out", clip, "--steps", 3) == 2
  assert "`steps` must be one of (4, 2, 1)" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_compile_fast")
def test_the_whole_experiment_runs_locally(tmp_path):
  words = ("train", "--config", f"{DIGITS}:runlocal", "--workdir", tmp_path)
  assert run(*words, "--data_dir", tmp_path / "data") == 0
  report = tmp_path / "report.html"
  assert report.stat().st_size > 10_000
  report.unlink()
  assert run("evaluate", tmp_path, "--data_dir", tmp_path / "data") == 0
  assert report.exists()


def test_compiled_programs_are_kept_unless_told_where(monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  try:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    cli._keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == before
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    cli._keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir == str(cli.CACHE / "programs")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_convert(tmp_path, capsys):
  """From PyTorch's layout to ours and back, with what the weights are for."""
  params, config = tiny_wan.params(), tiny_wan.CONFIG
  source, ours, back = (tmp_path / f"{i}.safetensors" for i in range(3))
  models.save_torch(source, params, config, {"stage": "consistency"})
  entries = tmp_path / "config.json"
  entries.write_text(
    json.dumps(
      dict(num_layers=2, dim=16, num_heads=2, ffn_dim=24, freq_dim=16)
      | dict(text_dim=6, text_len=3, in_dim=4, out_dim=4)
    )
  )
  words = ("convert", source, "--out", ours, "--network", entries)
  assert run(*words, "--pattern", "1,3", "--dtype", "bfloat16") == 0
  assert capsys.readouterr().out.strip() == str(ours)
  loaded, about = models.load_params(ours)
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  jax.tree.map(np.testing.assert_array_equal, loaded, rounded)
  assert about["stage"] == "consistency"
  assert about["pattern"] == {"first": 1, "rest": 3}
  assert models.config_from(about) == dataclasses.replace(
    config, time_scale=1000.0
  )

  words = ("convert", ours, "--out", back, "--layout", "diffusers")
  assert run(*words, "--pattern", "3,3") == 2
  message = capsys.readouterr().err
  assert "pattern.first is 1, expected 3" in message
  assert not back.exists()
  assert run(*words) == 0
  assert models.torch_about(back)["pattern"] == {"first": 1, "rest": 3}
  _, again = models.params_from_torch(back, config)
  jax.tree.map(np.testing.assert_array_equal, again, rounded)
  assert run(*words, "--pattern", "3,3", "--force") == 0
  assert models.torch_about(back)["pattern"] == {"first": 3, "rest": 3}


def test_convert_says_what_is_wrong(tmp_path, capsys):
  page = tmp_path / "model.pth"
  page.write_text("<!doctype html>")
  assert run("convert", page, "--out", tmp_path / "a.safetensors") == 2
  assert "is a web page" in capsys.readouterr().err
  assert not (tmp_path / "a.safetensors").exists()
