"""Runs every golden test and writes the errors to docs/parity.md.

  python tools/parity_table.py [--golden FOLDER] [--errors FILE]

With `--golden` the tests read the complete recordings of a folder instead of
those in `tests/golden`. With `--errors` the errors are kept in a file, which
a second call reads instead of running the tests again.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "parity.md"
TESTS = (
  "tests/core/test_paths.py",
  "tests/core/test_time_sampling.py",
  "tests/kernels/test_golden_attention.py",
  "tests/kernels/test_mask.py",
  "tests/losses/test_golden_losses.py",
  "tests/losses/test_golden_rcm.py",
  "tests/models/test_wan_golden.py",
  "tests/models/test_wan_precision.py::test_rounded_times_are_the_references",
  "tests/sampling/test_rollout_golden.py",
  "tests/sampling/test_schedules.py",
  "tests/sampling/test_solvers.py",
  "tests/training/test_counters.py",
  "tests/training/test_ema.py",
  "tests/training/test_golden_self_forcing.py",
  "tests/training/test_golden_train_loop.py",
  "tests/training/test_objectives.py::"
  "test_noisy_context_has_the_references_times",
  "tests/training/test_optimizer.py",
)
COLUMNS = (
  ("value", "x64"),
  ("gradient", "x64"),
  ("value", "float32"),
  ("gradient", "float32"),
)
INTRODUCTION = """# Parity with the original implementation

Relative errors against numbers that the original PyTorch implementation
(NVlabs/rcm, commit ed3cb14) computed in float64 with recorded draws; see
`tests/golden/README.md`. Each row is one recording, each error the largest of
what the row lists: losses one by one, everything else in the 2-norm. "norm"
is the norm of the gradient over all parameters, "gradient" its distance,
"sketch" an estimate of that distance where the gradient is not in the
repository.

| Allowed | values | gradients |
|---|---|---|
| with x64 | 1e-9 (UniPC and the Euler grids: 1e-6) | 1e-8 |
| in float32 | 1e-4 | 1e-3 |

The solvers that are allowed 1e-6 were recorded with coefficients, times or
grids in float32. A `-` means that there is nothing of the kind.
"""


def run_tests(errors: pathlib.Path, golden: str | None) -> None:
  """Runs the golden tests, which append their errors to a file."""
  settings = {"CRCM_PARITY": str(errors)}
  if golden:
    settings["CRCM_GOLDEN"] = str(pathlib.Path(golden).resolve())
  command = (sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow")
  subprocess.run(
    [*command, *TESTS], cwd=ROOT, env=os.environ | settings, check=True
  )


@dataclasses.dataclass
class Row:
  """What one recording holds that was compared, and its largest errors."""

  what: dict[str, None] = dataclasses.field(default_factory=dict)
  errors: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)


def read_rows(errors: pathlib.Path) -> dict[str, Row]:
  """Returns the rows of the table."""
  rows = collections.defaultdict(Row)
  for line in errors.read_text(encoding="utf-8").splitlines():
    record = json.loads(line)
    row = rows[_row(record["case"], record["what"])]
    row.what[record["what"]] = None
    kind = "gradient" if record["kind"] == "gradient" else "value"
    for mode in {"x64", "float32"} & record.keys():
      key = (kind, mode)
      row.errors[key] = max(row.errors.get(key, 0.0), record[mode])
  return rows


def _row(case: str, what: str) -> str:
  """Returns the row of a number; some tables of one kind share one."""
  if case.startswith("masks/"):
    return "masks"
  if case not in ("misc", "components"):
    return case
  for kind in ("alternation", "ctx_time"):
    if what.startswith(kind):
      return f"{case}/{kind}_*"
  return f"{case}/{what}"


def recorded_cases(golden: str | None) -> set[str]:
  """Lists what must have a row: every case of every file."""
  from crcm_jax.testing import golden as files

  names = set()
  for path in pathlib.Path(golden or ROOT / "tests" / "golden").glob("*.npz"):
    if path.stem in ("weights", "weights_mid", "misc", "components", "masks"):
      continue
    names |= {f"{path.stem}/{case}" for case in files.cases(path)}
  return names


def write_page(rows: dict[str, Row], complete: bool) -> None:
  """Writes the table."""
  command = "python tools/parity_table.py"
  command += " --golden FOLDER" if complete else ""
  source = (
    "It read the complete recordings, of which `tests/golden` holds a part:"
    " fewer cases of attention, and sketches of some gradients.\n"
    if complete
    else ""
  )
  lines = [
    INTRODUCTION,
    f"Written by `{command}` on {datetime.date.today()}, with JAX"
    f" {_jax_version()} on a CPU. {source}",
    f"{len(rows)} rows. The largest errors of all: {_largest(rows)}.\n",
    "| Recording | What | x64 values | x64 gradients | float32 values"
    " | float32 gradients |",
    "|---|---|---|---|---|---|",
  ]
  for name in sorted(rows):
    row = rows[name]
    cells = (_cell(row.errors.get(column)) for column in COLUMNS)
    lines.append(f"| `{name}` | {_what(name, row)} | {' | '.join(cells)} |")
  PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _what(name: str, row: Row) -> str:
  """Returns what a row compares; a row of one number is named by it."""
  if name == "masks":
    return "286 masks"
  if name.endswith("_*"):
    return f"{len(row.what)} tables"
  return "" if name.startswith(("misc", "components")) else ", ".join(row.what)


def _largest(rows: dict[str, Row]) -> str:
  parts = []
  for kind, mode in COLUMNS:
    error = max(row.errors.get((kind, mode), 0.0) for row in rows.values())
    parts.append(f"{mode} {kind}s {_cell(error)}")
  return ", ".join(parts)


def _cell(error: float | None) -> str:
  if error is None:
    return "-"
  return "0" if error == 0 else f"{error:.1e}"


def _jax_version() -> str:
  import jax

  return jax.__version__


def main() -> None:
  """Runs the tests, or reads their errors, and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--golden")
  parser.add_argument("--errors", type=pathlib.Path)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    errors = arguments.errors or pathlib.Path(folder) / "errors.jsonl"
    if not errors.exists():
      run_tests(errors, arguments.golden)
    rows = read_rows(errors)
  if missing := recorded_cases(arguments.golden) - rows.keys():
    raise SystemExit(f"no test compared: {sorted(missing)}")
  write_page(rows, complete=arguments.golden is not None)
  print(f"{PAGE.relative_to(ROOT)}: {len(rows)} rows")


if __name__ == "__main__":
  main()
