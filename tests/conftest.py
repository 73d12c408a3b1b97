"""Settings for every test: strict JAX, a shared compilation cache."""

import logging
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# For the tests that compile for TPUs without one.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jaxtyping
import pytest

ROOT = pathlib.Path(__file__).parent.parent
STRICT = ("kernels", "losses", "sampling", "models", "testing", "core")

jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture(autouse=True)
def _strict_promotion(request):
  """Forbids implicit rank and dtype promotion in tests of the pure maths."""
  folder = pathlib.Path(request.node.fspath).parent.name
  strict = folder in STRICT
  with (
    jax.numpy_rank_promotion("raise" if strict else "allow"),
    jax.numpy_dtype_promotion("strict" if strict else "standard"),
  ):
    yield


@pytest.fixture(params=["x64", pytest.param("float32", marks=pytest.mark.slow)])
def precision(request):
  """Runs a test with x64, and without it (slow)."""
  with jax.enable_x64(request.param == "x64"):
    yield request.param


@pytest.fixture
def restore_logging():
  """Takes back what a command does to the logger."""
  logger = logging.getLogger("crcm_jax")
  yield
  logger.handlers.clear()
  logger.propagate = True


@pytest.fixture
def unchecked():
  """Turns the run-time type checks off, to reach a function's own errors."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)
