"""Self-forcing against the reference: values, gradients, every replay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from golden_networks import check_case, load, network, video
from golden_self_forcing import (
  batch,
  compiled,
  counters,
  critic,
  draws,
  frozen,
  self_forcing,
  settings,
)
from parity import GOLDEN, real

from crcm_jax.testing import golden
from crcm_jax.training import objectives
from crcm_jax.training.objectives import _self_forcing
from crcm_jax.training.objectives._continuous_consistency import (
  ContinuousConsistencyDraws,
)
from crcm_jax.training.objectives._joint import JointDraws

CLEAN, NOISY, CRITIC, JOINT = "sf_dmd", "sf_dmd_noisyctx", "critic", "joint"

pytestmark = pytest.mark.usefixtures("precision")


def _run(case, objective, trainable="student", compiled=compiled):
  return compiled(objective)(
    network(trainable)[1],
    frozen(),
    batch(case),
    draws(case, settings(case), case["mid/D_time"]),
    counters(case),
  )


def _check(file, case, per_example, metrics, grads):
  check_case(file, case, per_example, grads)
  scores = np.asarray(metrics.gradient_norm) ** 2
  name, losses = f"{file}/{case.name}", case["loss_per_sample"]
  parity.check_each(name, "score difference", scores, losses)


def _cases(file, fast):
  """All cases of a file; those that repeat a kind are slow."""
  return [
    name if name in fast else pytest.param(name, marks=pytest.mark.slow)
    for name in golden.cases(GOLDEN / f"{file}.npz")
    if "nan" not in name
  ]


@pytest.mark.parametrize(
  "name",
  _cases(
    CLEAN, ["default_it0_c1-1", "default_it3_g5_c1-1", "sched42_it3_c1-3"]
  ),
)
def test_parallel_replay_with_clean_context(name):
  case = load(CLEAN, name)
  _check(CLEAN, case, *_run(case, self_forcing(case)))


@pytest.mark.parametrize(
  "name",
  _cases(NOISY, ["noisyctx1_it2_c1-3"]),
)
def test_parallel_replay_with_noisy_context(name):
  case = load(NOISY, name)
  _check(NOISY, case, *_run(case, self_forcing(case)))


def test_a_rollout_of_layers_that_lie_apart(monkeypatch):
  """As on a GPU, where it does not scan them."""
  asked = []
  platform = lambda: asked.append("gpu") or "gpu"
  monkeypatch.setattr(_self_forcing, "target_platform", platform)
  case = load(CLEAN, "default_it0_c1-1")
  run = functools.partial(_run, compiled=compiled.__wrapped__)
  _check(CLEAN, case, *run(case, self_forcing(case)))
  assert asked


@pytest.mark.parametrize("replay", ["chunks", "direct"])
@pytest.mark.parametrize(
  ("file", "name"),
  [
    pytest.param(CLEAN, "sched42_it3_c1-3", marks=pytest.mark.slow),
    (NOISY, "noisyctx1_it2_c1-3"),
  ],
)
def test_other_replays_have_the_same_gradients(file, name, replay):
  case = load(file, name)
  _check(file, case, *_run(case, self_forcing(case, replay)))


def test_bad_teacher_costs_its_example_alone():
  case = load(NOISY, "nan_in_teacher_sample1_c1-1")
  good = load(CLEAN, "default_it0_c1-1")
  data = batch(case)
  caption = data.null_condition.at[1].set(jnp.nan)  # Only the teacher's.
  poisoned = data._replace(null_condition=caption)
  drawn = draws(case, settings(case), case["mid/D_time"])
  loss, metrics, grads = compiled(self_forcing(case))(
    network("student")[1], frozen(), poisoned, drawn, counters(case)
  )
  name = f"sf_dmd_noisyctx/{case.name}"
  parity.check_each(name, "loss", loss, case["loss_per_sample"])
  np.testing.assert_allclose(loss[0], good["loss_per_sample"][0], rtol=1e-4)
  assert metrics.dropped.tolist() == [0, 1]
  assert metrics.student_non_finite.tolist() == [0, 0]
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", _cases(CRITIC, ["default_it4_c1-3"]))
def test_critic(name):
  case = load(CRITIC, name)
  loss, _, grads = _run(case, critic(case), "fake_score")
  check_case(CRITIC, case, loss, grads)


@pytest.mark.parametrize("name", _cases(JOINT, ["it10_noisyctx1_c1-3"]))
def test_joint_with_continuous_consistency(name):
  case = load(JOINT, name)
  rules = settings(case)
  noisy, start = rules["context"] == "last_step", rules["context_start"]
  last = tuple(times[-1] for times in rules["mid_times"])
  consistency = objectives.ContinuousConsistency(
    student=network("student")[0],
    teacher=network("causal_teacher")[0],
    pattern=rules["pattern"],
    guidance=case.config["causal_guidance"],
    tangent_warmup=case.config["tangent_warmup"],
    context_times=((0.0,) * start + last[start:]) if noisy else (0.0,),
  )
  replay = "chunks" if "replayed" in name else "parallel"
  objective = objectives.Joint(
    objectives=(consistency, self_forcing(case, replay)), starts=(0, 0)
  )
  drawn = ContinuousConsistencyDraws(
    t=real(case["mid/time"]).reshape(-1),
    noise=video(case, "draw/eps"),
    context_noise=video(case, "draw/ctx_noise_0") if noisy else None,
  )
  loss, metrics, grads = compiled(objective)(
    network("student")[1],
    frozen(),
    batch(case),
    JointDraws((drawn, draws(case, rules, case["mid/D_time"]))),
    counters(case),
  )
  check_case(JOINT, case, loss, grads)
  recorded = case["loss_tf_scm"]
  parity.check_each(f"joint/{name}", "loss scm", metrics.losses[0], recorded)
