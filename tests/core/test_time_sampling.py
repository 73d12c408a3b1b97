"""Training-time laws: golden values, inverses, and FoPP."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import GOLDEN, real

from crcm_jax import time_sampling
from crcm_jax.testing import golden
from crcm_jax.time_sampling import LogNormal, ShiftedUniform

MISC = golden.load(GOLDEN / "misc.npz")
LAWS = {
  "lognormal_-0.8_1.6": LogNormal(-0.8, 1.6),
  "lognormal_0.7_1.6": LogNormal(0.7, 1.6),
  "uniformshift_5": ShiftedUniform(5.0),
  "uniformshift_3": ShiftedUniform(3.0),
  "uniformshift_0": ShiftedUniform(1.0),  # the reference's 0: no shift
}
monotone = jax.jit(time_sampling.monotone, static_argnums=(1, 2, 3))


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", LAWS)
def test_laws_match_the_reference(name):
  law = LAWS[name]
  raw, t, u = (
    real(MISC[key]) for key in (f"sample_{name}_raw", "rf_t", "icdf_u")
  )
  parity.check(
    "misc", f"sample_{name}", law.from_raw(raw), MISC[f"sample_{name}_t"]
  )
  parity.check("misc", f"cdf_{name}", law.cdf(t), MISC[f"cdf_{name}"])
  # Between 1 - 1e-9 and 1 float32 has no number.
  held = jnp.abs(u - 0.5) <= 0.5 - 8 * jnp.finfo(u.dtype).eps
  recorded = MISC[f"icdf_{name}"][held]
  parity.check("misc", f"icdf_{name}", law.icdf(u[held]), recorded)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(
  ("name", "law"),
  [("us5", ShiftedUniform(5.0)), ("ln", LogNormal(-0.8, 1.6))],
)
def test_monotone_matches_the_reference(name, law):
  anchor = jnp.asarray(MISC[f"fopp_{name}_anchor_idx"])
  draws = ("anchor_t", "fopp_exp_0", "fopp_exp_1")
  recorded = (real(MISC[f"fopp_{name}_{draw}"]) for draw in draws)
  t = time_sampling.monotone_from_draws(law, anchor, *recorded)
  parity.check("misc", f"fopp_{name}", t, MISC[f"fopp_{name}_t"])


@settings(max_examples=30, deadline=None)
@given(u=st.floats(0.01, 0.99), name=st.sampled_from(list(LAWS)))
def test_distribution_functions_invert(u, name):
  law, u = LAWS[name], jnp.float32(u)
  np.testing.assert_allclose(law.cdf(law.icdf(u)), u, rtol=1e-4)


@pytest.mark.parametrize("law", LAWS.values())
def test_samples_follow_their_law(law):
  t = law.sample(jax.random.key(0), (4000,))
  assert t.dtype == jnp.float32
  u = np.sort(law.cdf(t))
  # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
  assert np.abs(u - np.linspace(0, 1, u.size)).max() < 1.95 / np.sqrt(u.size)


def test_monotone_times_increase_and_keep_the_anchor():
  law = LogNormal(-0.8, 1.6)
  t = monotone(jax.random.key(1), law, 500, 5)
  assert t.shape == (500, 5)
  assert (jnp.diff(t, axis=1) >= 0).all()
  anchor_key, time_key, *_ = jax.random.split(jax.random.key(1), 4)
  anchor = jax.random.randint(anchor_key, (500,), 0, 5)
  np.testing.assert_allclose(
    t[jnp.arange(500), anchor], law.sample(time_key, (500,)), rtol=1e-4
  )


def test_monotone_chunks_differ_in_law():
  """SPEC S10: the chunks' marginals are not the anchor's law."""
  t = monotone(jax.random.key(2), ShiftedUniform(1.0), 20000, 5)
  np.testing.assert_allclose(
    t.mean(0), [0.229, 0.377, 0.500, 0.623, 0.771], atol=0.01
  )


def test_monotone_of_one_chunk_is_the_law():
  t = monotone(jax.random.key(3), ShiftedUniform(5.0), 4, 1)
  assert t.shape == (4, 1)
  assert jnp.isfinite(t).all()


def test_laws_refuse_settings_without_meaning():
  with pytest.raises(ValueError, match="`std` must be positive"):
    LogNormal(0.0, 0.0)
  with pytest.raises(ValueError, match="`shift` must be positive"):
    ShiftedUniform(0.0)
