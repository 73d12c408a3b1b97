"""Linear layers as GPUs run them: the same, with their rows kept together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.kernels import _compat
from crcm_jax.models import _layers


def squares(params, x):
  y = _layers.Linear(2, jnp.float32).apply({"params": params}, x)
  return jnp.sum(y * y)


def tangent_of_gradient(params, x):
  gradient = lambda params: jax.grad(squares)(params, x)
  return jax.jvp(gradient, (params,), (params,))


def of_many(params, x):
  return jax.vmap(squares, (None, 0))(params, jnp.stack([x, 2 * x]))


@pytest.mark.parametrize("run", [tangent_of_gradient, of_many])
def test_rows_kept_together_compute_the_same(run, monkeypatch):
  keys = jax.random.split(jax.random.key(0), 3)
  params = dict(
    kernel=jax.random.normal(keys[0], (3, 2)),
    bias=jax.random.normal(keys[1], (2,)),
  )
  x = jax.random.normal(keys[2], (4, 3))
  want = jax.jit(run)(params, x)
  monkeypatch.setattr(_compat, "target_platform", lambda: "gpu")
  monkeypatch.setattr(_compat, "_LAYOUTS_ARE_PARTITIONED", True)
  lowered = jax.jit(lambda *args: run(*args)).lower(params, x)
  assert "LayoutConstraint" in lowered.as_text()
  got = lowered.compile()(params, x)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), got, want)
