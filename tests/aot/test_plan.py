"""Plans for TPUs are made by the real compiler, without a TPU."""

import dataclasses

import pytest

from crcm_jax import training
from crcm_jax.training import plan

pytestmark = pytest.mark.aot


def test_a_step_of_the_digits_on_four_chips():
  config = training.load_config("experiments/configs/moving_digits.py")
  stage = training.read_experiment(config).stages["consistency"]
  rules = ((".*blocks/.*/kernel", (None, "fsdp", "tensor")), (".*", ()))
  stage = dataclasses.replace(stage, mesh=dict(fsdp=4), rules=rules)
  topology = plan.parse_topology("v5e:2x2")
  plan.prepare(topology)
  found = plan.plan_step(stage, "student", topology)
  assert found.fits
  assert found.memory.activations > 0
  # Each layer's kernels are gathered, and gradients come together.
  parameters = 4 * stage.model.config.parameter_count()
  collectives = found.traffic.collectives
  assert collectives["all-gather"].count >= stage.model.config.layers
  reduced = sum(
    collectives[kind].bytes
    for kind in ("all-reduce", "reduce-scatter")
    if kind in collectives
  )
  assert reduced >= parameters
  assert found.roofline.step > 0


def test_libtpu_names_shapes_it_does_not_know():
  topology = plan.parse_topology("v5e:7x7")
  plan.prepare(topology)
  stage = training.read_experiment(
    training.load_config("experiments/configs/moving_digits.py:runlocal")
  ).stages["causal"]
  stage = dataclasses.replace(stage, mesh=dict(data=49))
  with pytest.raises(ValueError, match=r"'v5e:7x7' must be a shape that libtp"):
    plan.plan_step(stage, "student", topology)
