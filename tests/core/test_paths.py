"""Paths: golden time maps, closed forms, and the two parameterisations."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import GOLDEN, real

from crcm_jax import losses, paths
from crcm_jax.testing import golden

MISC = golden.load(GOLDEN / "misc.npz")
unit = st.floats(0, 1, width=32)


def check(name, got):
  parity.check("misc", name, got, MISC[name])


@pytest.mark.usefixtures("precision")
def test_angles_and_times_match_the_reference():
  t, angle = real(MISC["rf_t"]), real(MISC["trigwrap_t"])
  check("rf_to_trig", paths.angle_from_time(t))
  check("trig_to_rf_of_trigwrap_t", paths.time_from_angle(angle))
  sigma = jnp.tan(paths.angle_from_time(t[:-1]))  # the last one is infinite
  parity.check("misc", "rf_to_sigma", sigma, MISC["rf_to_sigma"][:-1])
  check("gaussian_bell_w_of_rf_t", losses.gaussian_bell_weight(t))


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("shift", [0, 1, 3, 5])
def test_shifts_match_the_reference(shift):
  t = real(MISC["rf_t"])
  k = float(shift or 1)  # the reference's 0 is no shift
  check(f"shift_{shift}", paths.shift_time(t, k))
  check(f"inverse_shift_{shift}", paths.shift_time(t, 1 / k))


@settings(max_examples=50, deadline=None)
@given(t=unit, shift=st.floats(0.1, 20))
def test_time_maps_invert(t, shift):
  t = jnp.float32(t)
  angle = paths.angle_from_time(t)
  np.testing.assert_allclose(paths.time_from_angle(angle), t, atol=3e-7)
  back = paths.shift_time(paths.shift_time(t, shift), 1 / shift)
  np.testing.assert_allclose(back, t, rtol=1e-5, atol=1e-6)


def test_interpolation_keeps_its_ends_and_its_dtype():
  x_0, noise = jnp.arange(12.0).reshape(2, 3, 2), jnp.ones((2, 3, 2))
  t = jnp.array([[0.0, 0.5, 1.0]] * 2)
  x_t = paths.interpolate(x_0, noise, t)
  np.testing.assert_array_equal(x_t[:, 0], x_0[:, 0])
  np.testing.assert_array_equal(x_t[:, 2], noise[:, 2])
  half = paths.interpolate(
    x_0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), t
  )
  assert half.dtype == jnp.bfloat16
  v = noise - x_0
  np.testing.assert_allclose(paths.data_prediction(x_t, v, t), x_0, atol=1e-6)


def test_trigflow_is_the_same_path_at_another_scale():
  key = jax.random.split(jax.random.key(0), 4)
  x_0, noise, v = jax.random.normal(key[0], (3, 2, 3, 4))
  t = jax.random.uniform(key[1], (2, 3))
  velocity = lambda x, time: v + x * time[..., None]
  angle = paths.angle_from_time(t)
  x_t = paths.interpolate(x_0, noise, t)
  x_a = paths.trigflow_interpolate(x_0, noise, angle)
  z = (jnp.cos(angle) + jnp.sin(angle))[..., None]
  np.testing.assert_allclose(x_a, z * x_t, rtol=1e-5, atol=1e-6)
  f = paths.trigflow_velocity(velocity)(x_a, angle)
  np.testing.assert_allclose(
    paths.trigflow_data_prediction(x_a, f, angle),
    paths.data_prediction(x_t, velocity(x_t, t), t),
    rtol=1e-4,
    atol=1e-5,
  )


def _trigflow_f(angle):
  """Returns F(x, a) of a velocity, from the library's wrapper."""
  velocity = lambda x_t, t: jnp.sin(3 * x_t) + t
  x = jnp.linspace(-2, 2, angle.size)
  return x, paths.trigflow_velocity(velocity)(x, angle)


@pytest.mark.usefixtures("precision")
def test_trigflow_velocity_has_the_references_coefficients():
  """F = (cos a x - c_skip x - c_out v(c_in x)) / sin a, in the reference."""
  inner = slice(2, -1)  # the reference divides by sin a
  a = MISC["trigwrap_t"][inner]
  c_skip, c_out, c_in, c_noise = (
    MISC[f"trigwrap_{name}"][inner]
    for name in ("c_skip", "c_out", "c_in", "c_noise")
  )
  x, f = _trigflow_f(real(a))
  x = np.asarray(x, np.float64)
  v = np.sin(3 * c_in * x) + c_noise / 1000
  expected = (np.cos(a) * x - c_skip * x - c_out * v) / np.sin(a)
  parity.check("misc", "trigwrap (F)", f, expected)


@pytest.mark.usefixtures("precision")
def test_trigflow_times_have_the_references_derivatives():
  """c_in = 1 / (cos a + sin a) and the time, by forward differentiation."""
  angle = real(MISC["trigwrap_t"])
  along = (angle,), (jnp.ones_like(angle),)
  c_in = lambda a: 1 / (jnp.cos(a) + jnp.sin(a))
  time = lambda a: 1000 * paths.time_from_angle(a)
  for name, function in (("c_in", c_in), ("c_noise", time)):
    value, slope = jax.jvp(function, *along)
    check(f"trigwrap_{name}", value)
    check(f"trigwrap_d{name}_dt", slope)


def test_a_shift_that_is_not_positive_is_refused():
  with pytest.raises(ValueError, match="`shift` must be positive"):
    paths.shift_time(jnp.array(0.5), 0.0)


@pytest.mark.parametrize("mix", [paths.interpolate, paths.trigflow_interpolate])
def test_noise_that_would_be_shared_is_refused(mix, unchecked):
  del unchecked
  x_0, noise, t = jnp.zeros((2, 3, 4)), jnp.zeros((2, 1, 4)), jnp.zeros((2, 3))
  with pytest.raises(ValueError, match=r"`noise` .* \(2, 3, 4\).*\(2, 1, 4\)"):
    mix(x_0, noise, t)
