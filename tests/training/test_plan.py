"""Plans: topologies, what a program moves, memory by kind, what would fit."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax import lax
from jax.sharding import AbstractMesh

from crcm_jax import cli, training
from crcm_jax.training import flops, plan, sharding
from crcm_jax.training.plan import _compile, _hlo, _memory, _suggest

ROOT = pathlib.Path(__file__).parents[2]
DIGITS = "experiments/configs/moving_digits.py:runlocal"
RULES = ((".*blocks/.*/kernel", (None, "fsdp", "tensor")), (".*", ()))


@pytest.mark.parametrize(
  ("text", "devices", "platform"),
  [
    ("v5p:8x8x8", 512, "tpu"),
    ("v5e:16x16", 256, "tpu"),
    ("v6e:2x4", 8, "tpu"),
    ("h100:8", 8, "gpu"),
    ("cpu:8", 8, "cpu"),
  ],
)
def test_a_topology_is_a_chip_and_a_shape(text, devices, platform):
  topology = plan.parse_topology(text)
  assert (topology.devices, topology.chip.platform) == (devices, platform)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("v9x:8", r"must be CHIP:SHAPE, one of \['v5e:AxB', 'v5p:AxBxC'"),
    ("v5e", r"got 'v5e'"),
    ("v5e:0x4", r"got 'v5e:0x4'"),
    ("v5e:4x4:2", r"got 'v5e:4x4:2'"),
    ("v5e:16", r"'v5e:16' must be v5e:AxB, with 2 number\(s\); got 1"),
    ("h100:2x4", r"must be h100:A, with 1 number\(s\); got 2"),
  ],
)
def test_a_wrong_topology_names_those_there_are(text, message):
  with pytest.raises(ValueError, match=message):
    plan.parse_topology(text)


PROGRAM = """
%body (p: (s32[], f32[8,4], f32[5,4,4])) -> (s32[], f32[8,4], f32[5,4,4]) {
  %p = (s32[], f32[8,4]{1,0}, f32[5,4,4]{2,1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %w = f32[5,4,4]{2,1,0} get-tuple-element(%p), index=2
  %slice = f32[1,4,4]{2,1,0} fusion(%w, %x), kind=kLoop, calls=%sliced
  %all = f32[4,4]{1,0:T(8,128)} all-gather(%slice), dimensions={0}
  %dot = f32[8,4]{1,0} dot(%x, %all), lhs_contracting_dims={1}
  ROOT %out = (s32[], f32[8,4]{1,0}, f32[5,4,4]{2,1,0}) tuple(%x, %dot, %w)
}

%sliced (a: f32[5,4,4], b: f32[8,4]) -> f32[1,4,4] {
  %a = f32[5,4,4]{2,1,0} parameter(0)
  %b = f32[8,4]{1,0} parameter(1)
  ROOT %ds = f32[1,4,4]{2,1,0} dynamic-slice(%a, %b), dynamic_slice_sizes={1}
}

%condition (p: (s32[], f32[8,4], f32[5,4,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}, f32[5,4,4]{2,1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %five = s32[]{:T(128)} constant(5), backend_config={}
  ROOT %lt = pred[]{:T(512)} compare(%i, %five), direction=LT
}

ENTRY %main (x: f32[8,4], w: f32[5,4,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %w = f32[5,4,4]{2,1,0} parameter(1)
  %t = (s32[], f32[8,4]{1,0}, f32[5,4,4]{2,1,0}) tuple(%x, %x, %w)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %near = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} convert(%y)
  ROOT %sum = f32[8,4]{1,0} all-reduce(%y), to_apply=%condition
}
"""


def test_what_a_program_moves():
  moved = _hlo.traffic(PROGRAM)
  x, w = 8 * 4 * 4, 4 * 4 * 4
  assert moved.collectives == {"all-gather": (5, 5 * w), "all-reduce": (1, x)}
  assert moved.sent == 5 * w + 2 * x
  body = (w + x + w) + 2 * w + (x + w + x)  # the fusion, gather, product
  assert moved.memory == 5 * body + x + 2 * x  # `near` is no memory


def test_the_trip_count_of_a_loop_is_assumed_where_it_is_not_known():
  unknown = PROGRAM.replace("direction=LT", "direction=NE")
  noted = unknown.replace(
    "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
  )
  assert _hlo.traffic(unknown, trips=2.5).collectives["all-gather"][0] == 2.5
  assert _hlo.traffic(noted).collectives["all-gather"][0] == 7


def test_the_larger_branch_of_a_real_program_and_its_loops_count():
  def run(x, w):
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x)

  x, w = jnp.ones((64, 64)), jnp.ones((9, 64, 64))
  text = jax.jit(run).lower(x, w).compile().as_text()
  array = x.size * 4
  # A product reads two arrays and writes one; so does the tanh, or does not.
  assert 3 * 10 * array < _hlo.traffic(text).memory < 12 * 10 * array


def test_a_refused_program_says_what_it_would_need():
  says = _compile._temporaries
  assert says("the total memory required for HLO temporaries (552.89G)") == (
    552.89 * 2**30
  )
  assert says("Used 512.0M of 15.75G hbm.") == 2**29
  assert says("no idea") is None


def stage_of(**changes):
  network = tiny.config()["network"] | changes.pop("network", {})
  data = tiny.config()["data"] | changes.pop("data", {})
  config = tiny.config(
    network=network,
    data=data,
    sharding=RULES,
    stages=("diffusion", "matching"),
    matching=tiny.SELF_FORCING,
  )
  return training.read_experiment(config | changes).stages


def test_memory_by_kind_is_that_of_hand_counted_shards():
  wide = dict(layers=2, width=16, heads=2, ffn_width=32)
  stage = stage_of(network=wide, data=dict(batch_size=8))["matching"]
  mesh = AbstractMesh((2, 4, 1, 1), sharding.AXES)
  given = training.step_arguments(stage, mesh)
  found = _memory.memory(stage, given, mesh.shape, 1e6)
  # Attention's eight kernels and the two of the feed-forward are split.
  split = 2 * (8 * 16 * 16 + 2 * 16 * 32)
  count = stage.model.config.parameter_count()
  one = 4 * (count - split + split / 4)
  assert found.parameters == 2 * one
  assert found.ema == found.frozen == one
  counters = 2 * 2 * 4  # each Adam counts its updates, twice
  assert found.optimizer == 2 * 2 * one + counters
  video, text = 2 * 2 * 2 * 2, 2 * 4  # [f h w c] and [l m]
  assert found.batch == 4 * (video + 2 * text)
  tokens, layers = 2 * 1, 2  # a token a frame
  keys = layers * 8 * (tokens + 2) * 16  # and of the prompt
  assert found.cache == (2 * 4 * keys + 2 * 4) / 8
  assert found.activations == 1e6 - found.cache
  assert found.total == pytest.approx(sum(found))


def test_data_is_what_the_other_axes_leave():
  eight = plan.parse_topology("cpu:8")
  whole = dict(data=4, fsdp=2, context=1, tensor=1)
  assert plan.mesh_shape(eight, dict(fsdp=2)) == whole
  assert plan.mesh_shape(eight, whole) == whole
  for wrong in (dict(fsdp=3), dict(data=1, fsdp=4), dict(tensor=16)):
    with pytest.raises(ValueError, match="to the number of devices, 8"):
      plan.mesh_shape(eight, wrong)
  message = r"`mesh.fdsp` is no axis \(did you mean `fsdp`\?\)"
  with pytest.raises(ValueError, match=message):
    plan.mesh_shape(eight, dict(fdsp=2))


def test_the_batch_must_divide():
  mesh = AbstractMesh((2, 2, 1, 1), sharding.AXES)
  message = r"`data.batch_size` must divide by the devices .* = 4; got 2"
  with pytest.raises(ValueError, match=message):
    training.step_arguments(stage_of()["diffusion"], mesh)


ONE = plan.parse_topology("cpu:1")


@pytest.fixture(scope="module")
def large():
  """A stage whose activations take most of the memory, and its plan."""
  stage = stage_of(
    network=dict(layers=6, width=16, ffn_width=64),
    data=dict(height=16, width=16),
  )["diffusion"]
  return stage, plan.plan_step(stage, "student", ONE)


def test_a_plan_of_one_device(large):
  stage, found = large
  assert found.fits
  assert found.traffic.collectives == {}
  assert found.necessary == flops.step(stage)
  assert found.executed.matmul == found.necessary.matmul
  # Attention's gradient computes the scores again: 2 + 5 products, not 2 + 4.
  assert 6 * found.executed.attention == 7 * found.necessary.attention
  assert found.roofline.compute == found.executed.total / ONE.chip.peak
  assert found.roofline.step == max(found.roofline)
  assert found.intensity == found.executed.total / found.traffic.memory
  text = plan.report(stage, "student", ONE, found)
  assert "estimate: compiled for 1 fake CPU device(s)" in text
  assert "of 4.00 GiB: fits" in text


def test_what_is_suggested_fits(large):
  stage, found = large
  limit = 0.7 * found.memory.total
  tight = dataclasses.replace(found, limit=limit)
  change = plan.suggest(stage, "student", tight)
  assert change.remat is not None
  assert change.mesh == dict.fromkeys(sharding.AXES, 1)
  changed = _suggest.with_changes(stage, change.remat, change.mesh)
  checked = plan.plan_step(changed, "student", ONE, limit=limit)
  assert checked.fits
  assert checked.memory.total == pytest.approx(change.memory.total, rel=0.3)
  text = plan.report(stage, "student", ONE, tight, change)
  assert "DOES NOT FIT" in text
  assert f"make it fit: network.remat={change.remat!r}" in text


def test_the_smallest_change_comes_first(large):
  stage, found = large
  found = dataclasses.replace(found, mesh=found.mesh | dict(data=2))
  state = sum(found.memory[:3])
  few = found.memory._replace(cache=0.0, activations=state / 10)
  # Only state: more devices along fsdp, at the cost of data.
  tight = dataclasses.replace(found, memory=few, limit=0.95 * few.total)
  change = plan.suggest(stage, "student", tight)
  assert change.mesh == dict(data=1, fsdp=2, context=1, tensor=1)
  # Nothing helps but a larger mesh; two examples divide no further.
  tight = dataclasses.replace(tight, limit=0.5 * few.total)
  assert plan.suggest(stage, "student", tight) is None
  big = dataclasses.replace(
    found,
    memory=few._replace(activations=1e9),
    limit=few.total + 1e9 / 3,
  )
  change = plan.suggest(stage, "student", big)
  assert (change.remat, change.mesh["context"]) == ("full", 4)


def test_what_does_not_divide_is_not_suggested(large):
  stage, found = large
  few = found.memory._replace(activations=1e9)
  tight = dataclasses.replace(found, memory=few, limit=few.total - 1e9 + 1e8)
  # 16 devices would do, and a frame has 64 tokens: 2 examples, 8 parts.
  change = plan.suggest(stage, "student", tight)
  assert change.mesh == dict(data=1, fsdp=2, context=8, tensor=1)
  narrow = stage_of(data=dict(height=2, width=2))["diffusion"]  # one token
  assert plan.suggest(narrow, "student", tight) is None


def test_remat_policies_are_tried_from_the_one_that_saves_most():
  found = [name for name in _suggest.REMAT if name in (None, "dots", "full")]
  assert found == [None, "dots", "full"]


def run(capsys, *words):
  status = cli.main(["plan", *words])
  return status, capsys.readouterr().err


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--topology", "v4:8"], "`--topology` must be CHIP:SHAPE"),
    ([], "the config has no `topology`"),
    (["--topology", "cpu:1", "--stage", "x"], "`--stage` must be one of"),
    (
      ["--topology", "cpu:1", "--mesh", "fsdp=2"],
      "`mesh` must multiply to the number of devices, 1; got fsdp 2",
    ),
    (["--topology", "cpu:999"], "needs 999 fake CPU devices"),
  ],
)
@pytest.mark.usefixtures("restore_logging")
def test_the_command_refuses_what_cannot_be_planned(capsys, words, message):
  status, error = run(capsys, DIGITS, *words)
  assert status == 2
  assert message in error


@pytest.mark.parametrize(
  "words", [["--mesh", "rows=2"], ["--mesh", "fsdp=0"], ["--memory", "-1"]]
)
def test_a_malformed_argument_is_refused(capsys, words):
  with pytest.raises(SystemExit) as exit_:
    cli.main(["plan", DIGITS, "--topology", "cpu:1", *words])
  assert exit_.value.code == 2
  assert f"argument {words[0]}: must be" in capsys.readouterr().err


@pytest.mark.usefixtures("restore_logging")
def test_without_libtpu_its_installation_is_named(capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  status, error = run(capsys, DIGITS, "--topology", "v5e:2x2")
  assert status == 2
  assert "`pip install libtpu`" in error


def test_the_command_plans_the_digits_for_eight_devices(tmp_path):
  out = tmp_path / "plan.json"
  words = [DIGITS, "--topology", "cpu:8", "--mesh", "context=2"]
  words += ["--stage", "causal", "--json", str(out)]
  done = subprocess.run(
    [sys.executable, "-m", "crcm_jax.cli", "plan", *words],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  assert "causal: student step on cpu:8, mesh data=4, context=2" in done.stdout
  assert "estimate: compiled for 8 fake CPU device(s)" in done.stdout
  (step,) = json.loads(out.read_text())["steps"]
  assert step["mesh"] == dict(data=4, fsdp=1, context=2, tensor=1)
  stage = training.read_experiment(training.load_config(DIGITS)).stages[
    "causal"
  ]
  # Parameters are whole everywhere, and the batch is split by 4.
  parameters = 4 * stage.model.config.parameter_count()
  memory = step["memory_bytes"]
  assert memory["parameters"] == memory["ema"] == parameters
  assert memory["optimizer"] == 2 * parameters + 2 * 4
  batch = sum(4 * math.prod(a.shape) for a in stage.dataset.shapes())
  assert memory["batch"] == batch / 4
  assert memory["activations"] > 0
  # Equal gradients everywhere take an all-reduce of all parameters at least.
  assert step["collectives"]["all-reduce"]["bytes"] >= parameters
  assert step["fits"]
  assert step["estimate"]


@pytest.mark.parametrize(
  ("variant", "teacher", "layers"),
  [
    ("tf,v5p-128", None, 30),
    ("tf,14b,v5p-64", None, 40),
    ("tf_scm,14b_teachers,v5p-32", "teacher", 30),
    ("sf_dmd,14b_teachers,v5p-64", "real", 30),
  ],
)
def test_the_papers_settings_have_a_planned_topology(variant, teacher, layers):
  config = training.load_config(f"experiments/configs/paper.py:{variant}")
  experiment = training.read_experiment(config)
  topology = plan.parse_topology(experiment.topology)
  (stage,) = experiment.stages.values()
  assert plan.mesh_shape(topology, stage.mesh)["fsdp"] == topology.devices
  assert stage.dataset.shapes().x_0.shape[0] % topology.devices == 0
  assert stage.model.config.layers == layers
  if teacher is not None:
    assert stage.networks[teacher].config.layers == 40
  if stage.kind.critic:
    assert stage.networks["fake"] == stage.networks["real"]
