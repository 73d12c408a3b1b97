"""Measures which derivatives compose at what cost, and publishes it.

Traces every cell of `tests/derivative_matrix.py` under both rules, counts the
attention passes that remain after dead code, and writes the table between the
markers of `docs/derivatives.md`. `tests/kernels/test_derivatives.py` runs the
same cells, and fails where the page says otherwise.

Usage: `python tools/write_derivatives.py [--check]`.
"""

import importlib
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "derivatives.md"
START = "<!-- written by tools/write_derivatives.py -->\n"
END = "<!-- end -->\n"


def main(arguments: list[str]) -> int:
  """Writes the page; with `--check`, only says whether it is up to date."""
  sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
  matrix = importlib.import_module("derivative_matrix")
  launches = importlib.import_module("launches")

  def measured(mode: str, transform: str, rule: str) -> dict[str, int]:
    os.environ["CRCM_ATTENTION_RULE"] = rule
    return launches.attention(matrix.traced(mode, transform))

  old = PAGE.read_text()
  before, _, rest = old.partition(START)
  _, _, after = rest.partition(END)
  new = f"{before}{START}\n{matrix.table(measured)}\n{END}{after}"
  if "--check" in arguments:
    print("up to date" if new == old else f"{PAGE} is out of date")
    return int(new != old)
  PAGE.write_text(new)
  print(f"wrote {PAGE}")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
