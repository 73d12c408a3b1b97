"""Programs for devices that are not there."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(autouse=True)
def _no_cache():
  """Without its chip, a TPU program cannot be read back from the cache.

  JAX decides once whether to use the cache, hence the resets: without them a
  second run in one checkout would read what the first one left.
  """
  jax.config.update("jax_enable_compilation_cache", False)
  compilation_cache.reset_cache()
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()
