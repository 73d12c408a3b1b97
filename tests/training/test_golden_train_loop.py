"""Seven iterations of student and critic against the reference's loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import parity
import pytest
from golden_networks import flat, network, sketch, video
from golden_self_forcing import critic, draws, self_forcing, settings
from parity import GOLDEN, real
from quick_jit import quick_jit

from crcm_jax import models, training
from crcm_jax.data import Batch
from crcm_jax.testing import golden
from crcm_jax.time_sampling import ShiftedUniform

LOOP = GOLDEN / "train_loop.npz"
ITERATIONS = 7


@dataclasses.dataclass(frozen=True)
class Recorded:
  """An objective whose draws of each iteration were recorded."""

  objective: Any
  table: Any

  def draws(self, key, batch, counters):
    del key, batch
    return jax.tree.map(lambda a: a[counters.iteration], self.table)

  def loss(self, *arguments):
    return self.objective.loss(*arguments)


def _recorded_draws(cases):
  law = ShiftedUniform(5.0)
  each = [
    draws(case, settings(case), law.from_raw(real(case["draw/D_time_raw"])))
    for case in cases
  ]
  return jax.tree.map(lambda *a: jnp.stack(a), *each)


def _steps(config, table, cases):
  """Returns the alternation, the optimizers and a train step a phase."""
  order = training.Alternation(student_every=config["student_update_freq"])
  optimizers = {
    phase: training.adamw(
      config[rate],
      b1=config["betas"][0],
      weight_decay=config["weight_decay"],
      warmup_steps=config["lr_warmup_steps"],
      warmup_start=config["f_start"],
    )
    for phase, rate in (("student", "lr_student"), ("critic", "lr_fake"))
  }
  # The reference sums over its batch of two; a train step takes the mean.
  objectives = {
    phase: Recorded(dataclasses.replace(make(cases[0]), loss_scale=2.0), table)
    for phase, make in (("student", self_forcing), ("critic", critic))
  }
  steps = {
    phase: training.make_train_step(
      objective,
      optimizers[phase],
      phase=phase,
      alternation=order,
      ema_rate=config["ema_rate"],
    )
    for phase, objective in objectives.items()
  }
  return order, optimizers, steps


@pytest.mark.usefixtures("precision")
def test_seven_iterations_are_the_references(monkeypatch):
  monkeypatch.setattr(jax, "jit", quick_jit)
  whole = golden.load(LOOP)
  cases = [golden.load(LOOP, f"it{i}") for i in range(ITERATIONS)]
  order, optimizers, steps = _steps(whole.config, _recorded_draws(cases), cases)
  state = training.init_state(
    network("student")[1],
    optimizers["student"],
    fake=network("fake_score")[1],
    fake_optimizer=optimizers["critic"],
  )
  frozen = {"real": network("bidirectional_teacher")[1]}
  for i, case in enumerate(cases):
    batch = Batch(
      x_0=video(whole, "x0"),
      condition=real(case["crossattn_emb"]),
      null_condition=real(whole["uncond_crossattn_emb"]),
    )
    phase = "student" if order.is_student(i) else "critic"
    assert (phase == "student") == bool(case["student"])
    state, metrics = steps[phase](state, frozen, batch, jax.random.key(0))
    name, total = f"train_loop/it{i}", case["loss_per_sample"].sum()
    parity.check(name, "loss", metrics["loss"], total)
    parity.check(
      name, "norm", metrics["grad_norm"], case["grad_norm"], "gradient"
    )
    for params, what in (
      (state.student, "student_wnorm"),
      (state.fake, "fake_wnorm"),
      (state.ema, "ema_wnorm"),
    ):
      parity.check(name, what, optax.tree.norm(params), case[what])

  assert int(state.step) == ITERATIONS
  assert int(state.student_updates) == 3
  assert int(state.fake_updates) == 4
  assert int(state.skipped) == 0
  assert all(step._cache_size() == 1 for step in steps.values())
  _check_final("student", state.student, "student")
  _check_final("ema", state.ema, "student")
  _check_final("fake_score", state.fake, "fake_score")


def _check_final(name, params, start):
  """Compares final weights; with x64, how far they moved from the start."""
  model, first = network(start)
  recorded = golden.load(LOOP, f"final_{name}").arrays
  ours, first = (
    models.params_to_torch(tree, model.config, layout="rcm")
    for tree in (params, first)
  )
  if "sketch" in recorded:
    recorded, ours, first = recorded["sketch"], sketch(ours), sketch(first)
  else:
    recorded, ours, first = map(flat, (recorded, ours, first))
  case = f"train_loop/final_{name}"
  if parity.precision() == "x64":
    parity.check(case, "change", ours - first, recorded - first, "gradient")
  parity.check(case, "weights", ours, recorded)
