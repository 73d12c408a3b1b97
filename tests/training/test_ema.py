"""The moving average: exponent, weights and profile."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import GOLDEN

from crcm_jax.testing import golden
from crcm_jax.training import ema_beta, ema_exponent, ema_update

MISC = golden.load(GOLDEN / "misc.npz")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_exponent_and_weights_are_the_references(rate):
  exponent = ema_exponent(rate)
  name = f"ema_exp_coefficient_{rate}"
  parity.check("misc", name, exponent, MISC[name])
  beta, rest = jax.vmap(lambda i: ema_beta(i, exponent))(jnp.arange(20))
  name = f"ema_beta_{rate}_first20"
  parity.check("misc", name, beta, MISC[name])
  parity.check("misc", f"1 - {name}", rest, 1 - MISC[name])


def test_small_weights_keep_their_digits_in_float32():
  # At update 10 million 1 - beta is 8e-7: 1 - exp(log_beta) has no digit left.
  _, rest = ema_beta(jnp.array(10_000_000), 6.9372)
  np.testing.assert_allclose(rest, 7.9372e-7, rtol=1e-4)


def test_profile_has_the_relative_width():
  exponent = ema_exponent(0.1)
  steps = 2000
  betas = (1 - 1 / np.arange(1, steps + 1)) ** (exponent + 1)
  after = np.append(np.cumprod(betas[::-1])[::-1][1:], 1.0)
  weight = (1 - betas) * after
  s = np.arange(steps) / steps
  mean = np.sum(weight * s)
  np.testing.assert_allclose(weight.sum(), 1, rtol=1e-9)
  width = np.sqrt(np.sum(weight * (s - mean) ** 2))
  np.testing.assert_allclose(width, 0.1, atol=1e-3)


def test_first_update_copies_the_parameters_in_the_averages_dtype():
  params = {"a": jnp.array([1.5, -2.0], jnp.bfloat16)}
  ema = {"a": jnp.array([7.0, 7.0], jnp.float32)}
  first = ema_update(ema, params, jnp.array(0), ema_exponent(0.1))
  np.testing.assert_array_equal(first["a"], [1.5, -2.0])
  assert first["a"].dtype == jnp.float32
  second = ema_update(first, {"a": jnp.zeros(2)}, jnp.array(1), 1.0)
  np.testing.assert_allclose(second["a"], [0.375, -0.5])


def test_widths_no_power_profile_has_are_refused():
  with pytest.raises(ValueError, match=r"`rate` must lie in .*got 0\.3"):
    ema_exponent(0.3)
