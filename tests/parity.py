"""Compares numbers with recorded ones, and keeps the errors for a table.

With the environment variable `CRCM_PARITY=FILE`, every comparison appends its
error to the file; `tools/parity_table.py` makes `docs/parity.md` of them. With
`CRCM_GOLDEN=FOLDER` the tests read the complete recordings of that folder
instead of those in `tests/golden`, which leave some arrays out.
"""

import json
import os
import pathlib

import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(
  os.environ.get("CRCM_GOLDEN", pathlib.Path(__file__).parent / "golden")
)

TOLERANCES = {
  "value": {"x64": 1e-9, "float32": 1e-4},
  "gradient": {"x64": 1e-8, "float32": 1e-3},
  "unipc": {"x64": 1e-6, "float32": 1e-4},  # its recording is half float32
}
"""The largest relative error allowed, by kind of number and precision."""


def precision():
  """Returns in which precision a test runs, "x64" or "float32"."""
  return "x64" if jnp.result_type(float) == jnp.float64 else "float32"


def real(array):
  """Returns recorded numbers as float64, or as float32 without x64."""
  return jnp.asarray(np.asarray(array, np.float64))


def relative(got, want):
  """Returns the relative distance in the 2-norm; 0 for two zeros."""
  got, want = (np.ravel(np.asarray(a, np.float64)) for a in (got, want))
  assert got.shape == want.shape, (got.shape, want.shape)
  distance, size = np.linalg.norm(got - want), np.linalg.norm(want)
  return 0.0 if distance == 0 else float(distance / size) if size else np.inf


def check(case, what, got, want, kind="value"):
  """Asserts that an error is small enough, after noting it down.

  Args:
    case: name of the recording, `file/case` or `file`.
    what: which of its numbers.
    got: ours.
    want: the recorded ones.
    kind: a key of `TOLERANCES`.
  """
  check_error(case, what, relative(got, want), kind)


def check_each(case, what, got, want, kind="value"):
  """As `check`, for the largest error of single numbers, such as losses."""
  got, want = np.ravel(got), np.ravel(want)
  pairs = zip(got, want, strict=True)
  check_error(case, what, max(relative(*pair) for pair in pairs), kind)


def check_error(case, what, error, kind="value"):
  """Asserts that an error is small enough, after noting it down."""
  mode = precision()
  if file := os.environ.get("CRCM_PARITY"):
    line = {"case": case, "what": what, "kind": kind, mode: error}
    with open(file, "a", encoding="utf-8") as out:
      out.write(json.dumps(line) + "\n")
  tolerance = TOLERANCES[kind][mode]
  assert error <= tolerance, f"{case} {what}: {error:.2e} > {tolerance:.0e}"
