"""Classifier-free guidance of velocity functions."""

import jax.numpy as jnp
import pytest

from crcm_jax import guidance


def conditional(x, t):
  return x + t


def unconditional(x, t):
  return x - t


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, jnp.float32(3.0)])
def test_guidance_extrapolates_from_the_unconditional(scale):
  x, t = jnp.array([1.0, 2.0]), jnp.array([0.5, 0.25])
  guided = guidance.classifier_free(conditional, unconditional, scale)
  expected = (x - t) + scale * 2 * t
  assert jnp.allclose(guided(x, t), expected)


def test_scale_one_never_calls_the_unconditional():
  assert guidance.classifier_free(conditional, _never, 1.0) is conditional


def _never(x, t):
  raise AssertionError("evaluated the unconditional branch")
