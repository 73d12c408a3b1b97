"""The tangent of a bfloat16 network against its float32 form."""

import jax
import jax.numpy as jnp
import pytest

from crcm_jax import testing


def network(dtype):
  def velocity(w, x, t):
    h = jnp.tanh(x.astype(dtype) @ w.astype(dtype))
    return h.astype(x.dtype) * t[:, None]

  return velocity


def check(**settings):
  x = jax.random.normal(jax.random.key(1), (4, 8))
  t = jnp.full((4,), 0.5)
  w = 0.5 * jax.random.normal(jax.random.key(0), (8, 8))
  narrow, wide = network(jnp.bfloat16), network(jnp.float32)
  return testing.check_tangent(
    narrow, w, x, t, jnp.cos(x), reference=wide, **settings
  )


def test_the_report_gives_the_cost_of_bfloat16():
  report = check(tolerance=0.05)
  assert 1e-4 < report.float64_error < 0.05
  assert min(report.errors) < 0.05  # differences of the float32 form
  assert f"float64   {report.float64_error:.2e}" in str(report)


def test_a_tangent_too_rough_is_refused():
  with pytest.raises(AssertionError, match=r"DISAGREES(.|\n)*float64"):
    check(tolerance=1e-4)
