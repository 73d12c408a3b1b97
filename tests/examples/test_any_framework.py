"""One loss, four frameworks, the same numbers."""

import pathlib
import runpy

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "any_framework.py"))


@pytest.mark.parametrize("name", [*EXAMPLE["FRAMEWORKS"]][1:])
def test_frameworks_agree_with_the_plain_function(name):
  if name == "equinox":
    pytest.importorskip("equinox")
  expected = EXAMPLE["run"]("plain")
  np.testing.assert_allclose(EXAMPLE["run"](name), expected, rtol=1e-5)
  assert np.min(expected) > 0.01
