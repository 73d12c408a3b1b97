"""The tangent of a bfloat16 network against its float32 form."""

import jax
import jax.numpy as jnp
import pytest

from crcm_jax import testing


def network(dtype):
  w = 0.5 * jax.random.normal(jax.random.key(0), (8, 8))

  def velocity(x, t):
    h = jnp.tanh(x.astype(dtype) @ w.astype(dtype))
    return h.astype(jnp.float32) * t[:, None]

  return velocity


def check(**settings):
  x = jax.random.normal(jax.random.key(1), (4, 8))
  t = jnp.full((4,), 0.5)
  narrow, wide = network(jnp.bfloat16), network(jnp.float32)
  return testing.check_tangent(
    narrow, x, t, jnp.cos(x), reference=wide, **settings
  )


def test_the_report_gives_the_cost_of_bfloat16():
  report = check(tolerance=0.05)
  assert 1e-4 < report.reference_error < 0.05
  assert min(report.errors) < 0.05  # differences of the float32 form
  assert f"reference {report.reference_error:.2e}" in str(report)


def test_a_tangent_too_rough_is_refused():
  with pytest.raises(AssertionError, match=r"DISAGREES(.|\n)*reference"):
    check(tolerance=1e-4)
