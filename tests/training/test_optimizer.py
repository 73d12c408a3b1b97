"""AdamW and its warm-up against the reference's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity
import pytest
from parity import GOLDEN, real

from crcm_jax.testing import golden
from crcm_jax.training import adamw
from crcm_jax.training._optimizer import warmed_up

MISC = golden.load(GOLDEN / "misc.npz")
SETTINGS = {
  "teacher": {"learning_rate": 1e-5, "b1": 0.9},
  "distill": {"learning_rate": 2e-6, "b1": 0.0},
  "fake": {"learning_rate": 4e-7, "b1": 0.0},
}


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_the_references(name):
  optimizer = adamw(**SETTINGS[name])
  params = {leaf: real(MISC[f"adamw_{name}_{leaf}0"]) for leaf in ("w", "b")}
  state = optimizer.init(params)
  steps = []
  for row in MISC[f"adamw_{name}_grads"]:
    grads = {"w": real(row[:12].reshape(3, 4)), "b": real(row[12:])}
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    steps.append(params)
  for leaf in ("w", "b"):
    key = f"adamw_{name}_{leaf}"
    got = jnp.stack([step[leaf] for step in steps])
    parity.check("misc", key, got, MISC[key])


@pytest.mark.usefixtures("precision")
def test_warm_up_is_the_references():
  optimizer = adamw(1.0, b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0)

  def step(state, _):
    updates, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    return state, -updates

  _, rates = jax.lax.scan(step, optimizer.init(jnp.zeros(())), None, 110)
  key = "lr_multiplier_first_110"
  parity.check_each("misc", key, rates, MISC[key])


def test_the_shown_learning_rate_is_the_used_one():
  settings = dict(learning_rate=0.3, warmup_steps=4, warmup_start=0.1, b1=0.0)
  optimizer = adamw(**settings, weight_decay=0.0, eps=0.0)
  schedule = warmed_up(**settings)
  state = optimizer.init(jnp.zeros(()))
  for i in range(6):
    updates, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    np.testing.assert_allclose(-updates, schedule(i), rtol=1e-5)
  assert schedule(5) == jnp.float32(0.3)


def test_gradients_are_clipped_before_the_moments():
  params, grads = jnp.zeros(2), jnp.array([30.0, 40.0])
  clipped = adamw(1.0, b1=0.0, eps=1.0, clip_norm=1.0, warmup_steps=0)
  plain = adamw(1.0, b1=0.0, eps=1.0, warmup_steps=0)
  got, _ = clipped.update(grads, clipped.init(params), params)
  want, _ = plain.update(grads / 50, plain.init(params), params)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_decay_can_spare_some_parameters():
  params = {"kernel": jnp.ones(1), "bias": jnp.ones(1)}
  optimizer = adamw(
    1.0, warmup_steps=0, decay_mask={"kernel": True, "bias": False}
  )
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.01, rtol=1e-6)
  np.testing.assert_array_equal(updates["bias"], 0)


def test_no_first_moment_is_kept_where_there_is_none():
  params = {"w": jnp.ones(1000)}
  size = lambda optimizer: sum(
    a.size for a in jax.tree.leaves(optimizer.init(params))
  )
  assert size(adamw(0.1, b1=0.9)) == pytest.approx(2000, abs=9)
  assert size(adamw(0.1, b1=0.0)) == pytest.approx(1000, abs=9)
