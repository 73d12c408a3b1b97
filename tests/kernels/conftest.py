"""Compiles without optimisation: these tests run many tiny programs once."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _quick_compile():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
