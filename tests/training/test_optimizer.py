"""AdamW and its warm-up against the reference's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_networks import GOLDEN

from crcm_jax.testing import golden
from crcm_jax.training import adamw

MISC = golden.load(GOLDEN / "misc.npz")
SETTINGS = {
  "teacher": {"learning_rate": 1e-5, "b1": 0.9},
  "distill": {"learning_rate": 2e-6, "b1": 0.0},
  "fake": {"learning_rate": 4e-7, "b1": 0.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_are_the_references(name):
  with jax.enable_x64(True):
    optimizer = adamw(**SETTINGS[name])
    params = {
      "w": jnp.asarray(MISC[f"adamw_{name}_w0"]),
      "b": jnp.asarray(MISC[f"adamw_{name}_b0"]),
    }
    state = optimizer.init(params)
    for step, row in enumerate(MISC[f"adamw_{name}_grads"]):
      grads = {"w": row[:12].reshape(3, 4), "b": row[12:]}
      grads = jax.tree.map(jnp.asarray, grads)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      for leaf in ("w", "b"):
        np.testing.assert_allclose(
          params[leaf], MISC[f"adamw_{name}_{leaf}"][step], rtol=1e-10
        )


@pytest.mark.parametrize("x64", [True, False])
def test_warm_up_is_the_references(x64):
  recorded = MISC["lr_multiplier_first_110"]
  optimizer = adamw(1.0, b1=0.0, b2=0.0, eps=0.0, weight_decay=0.0)

  def step(state, _):
    updates, state = optimizer.update(jnp.ones(()), state, jnp.zeros(()))
    return state, -updates

  with jax.enable_x64(x64):
    _, rates = jax.lax.scan(step, optimizer.init(jnp.zeros(())), None, 110)
  np.testing.assert_allclose(rates, recorded, rtol=1e-12 if x64 else 3e-7)


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
