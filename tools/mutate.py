"""Plants mistakes in the mathematics, one at a time, and runs the tests.

A suite that stays green under a mistake is a suite that nobody should trust.
Every mistake of `mutations.py` is made in a temporary copy of the package, and
the tests that must catch it run until the first one fails; a table says which.
Before that, the same tests must pass without a mistake.

Usage: python tools/mutate.py [--only TEXT] [--start N] [--trust] [--list]

Exits with 1 if a mistake survives or cannot be planted. The mistakes took 20
minutes on two busy cores; not part of CI.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

from mutations import Mutation, MUTATIONS

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("crcm_jax", "kernels", "tests", "pyproject.toml")
LINKED = ("experiments",)
_FAILED = re.compile(r"^(FAILED|ERROR) ([^\s]+)", re.MULTILINE)


def main(arguments: list[str]) -> int:
  """Plants the mistakes and returns the exit code."""
  parser = argparse.ArgumentParser(
    description="Plants mistakes in the mathematics and runs the tests."
  )
  parser.add_argument("--only", default="", help="part of a mistake's name")
  parser.add_argument("--start", type=int, default=1, help="its number")
  parser.add_argument(
    "--trust", action="store_true", help="skip the run without a mistake"
  )
  parser.add_argument("--list", action="store_true", help="plant nothing")
  options = parser.parse_args(arguments)
  chosen = {
    number: mutation
    for number, mutation in enumerate(MUTATIONS, 1)
    if options.only in f"{mutation.file}: {mutation.why}"
    and number >= options.start
  }
  misfits = [text for m in chosen.values() for text in _misfit(m)]
  for text in misfits:
    print(text, file=sys.stderr)
  if misfits or options.list:
    print(f"{len(chosen)} mistakes, {len(misfits)} that cannot be planted")
    return bool(misfits)
  with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
    return _plant_all(pathlib.Path(folder), chosen, options.trust)


def _misfit(mutation: Mutation):
  """Yields a message if the old text is not there exactly once."""
  count = (ROOT / "crcm_jax" / mutation.file).read_text().count(mutation.old)
  if count != 1:
    yield (
      f"{mutation.file}: {mutation.why}: the text to replace is there {count}"
      f" times, not once: {mutation.old!r}"
    )


def _plant_all(
  copy: pathlib.Path, mutations: dict[int, Mutation], trust: bool
) -> int:
  """Runs the tests without a mistake and with each; prints the table."""
  _copy_tree(copy)
  start = time.monotonic()
  if not trust:
    files = dict.fromkeys(m.tests for m in mutations.values())
    failed = _first_failure(copy, tuple(files))
    if failed:
      print(f"fails without any mistake: {failed}", file=sys.stderr)
      return 1
    print(f"without a mistake: passed in {time.monotonic() - start:.0f} s")
  survivors = 0
  for number, mutation in mutations.items():
    began = time.monotonic()
    caught = _plant(copy, mutation)
    survivors += not caught
    print(
      f"{number:2d} {time.monotonic() - began:4.0f} s  {mutation.file}:"
      f" {mutation.why}\n            {caught or 'SURVIVED'}",
      flush=True,
    )
  minutes = (time.monotonic() - start) / 60
  print(
    f"{len(mutations)} mistakes, {len(mutations) - survivors} caught,"
    f" {survivors} survived, {minutes:.1f} minutes"
  )
  return bool(survivors)


def _copy_tree(copy: pathlib.Path) -> None:
  """Copies what the tests need; the program cache starts empty."""
  skip = shutil.ignore_patterns("__pycache__", "*.npz")
  for name in COPIED:
    source = ROOT / name
    if source.is_dir():
      shutil.copytree(source, copy / name, symlinks=True, ignore=skip)
    else:
      shutil.copy(source, copy / name)
  for name in LINKED:
    (copy / name).symlink_to(ROOT / name)
  for file in (ROOT / "tests" / "golden").glob("*.npz"):
    (copy / "tests" / "golden" / file.name).symlink_to(file)


def _plant(copy: pathlib.Path, mutation: Mutation) -> str:
  """Returns the test that fails under a mistake, "" if none does."""
  path = copy / "crcm_jax" / mutation.file
  right = path.read_text()
  try:
    path.write_text(right.replace(mutation.old, mutation.new))
    return _first_failure(copy, (mutation.tests,))
  finally:
    path.write_text(right)


def _first_failure(copy: pathlib.Path, files: tuple[str, ...]) -> str:
  """Returns the first test that fails in the copy, "" if all pass.

  Raises:
    RuntimeError: if the tests could not run, which proves nothing.
  """
  environment = os.environ | {
    "PYTHONPATH": str(copy),
    "PYTHONDONTWRITEBYTECODE": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  }
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "--tb=no", *files],
    cwd=copy,
    env=environment,
    capture_output=True,
    text=True,
  )
  if done.returncode == 0:
    return ""
  failed = _FAILED.search(done.stdout)
  if done.returncode != 1 or failed is None or failed[1] == "ERROR":
    raise RuntimeError(f"the tests could not run:\n{done.stdout[-3000:]}")
  return failed[2]


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
