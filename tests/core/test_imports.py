"""Imports point one way, and the maths imports neither Flax nor Optax."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PACKAGE = ROOT / "crcm_jax"

# Each layer may import the layers below it, its own, and private modules.
LAYERS = (
  {"cli", "commands"},
  {"training", "evaluation", "generation"},
  {"losses", "sampling", "models", "data", "testing"},
  {"paths", "time_sampling", "chunks", "guidance"},
)
PURE = ("losses", "paths", "time_sampling", "guidance", "sampling", "chunks")


def _modules():
  return sorted(p for p in PACKAGE.rglob("*.py") if "kernels" not in p.parts)


def _part(path: pathlib.Path) -> str:
  first = path.relative_to(PACKAGE).parts[0]
  return first.removesuffix(".py")


def _imported_parts(path: pathlib.Path) -> set[str]:
  """Returns the parts of crcm_jax that a module imports."""
  names = []
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      names += [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
  parts = [name.split(".") for name in names]
  return {p[1] for p in parts if p[0] == "crcm_jax" and len(p) > 1}


def _level(part: str) -> int | None:
  return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


@pytest.mark.parametrize(
  "path", _modules(), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path):
  own = _level(_part(path))
  if own is None:
    return
  for part in _imported_parts(path):
    level = _level(part)
    assert level is None or level >= own, f"{path} imports {part}"
  if _part(path) != "models":
    layers_above_kernels = ("models", "training", "evaluation", "testing")
    allowed = _part(path) in layers_above_kernels
    assert allowed or "kernels" not in _imported_parts(path)


def test_kernels_know_nothing_of_the_library():
  for path in (ROOT / "kernels").rglob("*.py"):
    assert _imported_parts(path) <= {"kernels"}, path


@pytest.mark.parametrize("part", PURE)
def test_the_maths_imports_neither_flax_nor_optax(part):
  code = (
    f"import sys, crcm_jax.{part};"
    "heavy = {'flax', 'optax', 'orbax', 'ml_collections', 'tensorflow'};"
    "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


def test_no_private_jax():
  # JAX has no public name for the processes of a cluster, nor for the store of
  # its coordinator; Orbax takes them from the same place.
  allowed = PACKAGE / "training" / "_jax_distributed.py"
  for folder in (PACKAGE, ROOT / "kernels"):
    for path in folder.rglob("*.py"):
      assert path == allowed or "jax._src" not in path.read_text(), path
