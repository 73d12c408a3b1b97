"""Every option is read: fields of configs, keywords of functions."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import pytest

from crcm_jax import ChunkPattern, models

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [
  *sorted((ROOT / "crcm_jax").rglob("*.py")),
  *sorted((ROOT / "kernels").rglob("*.py")),
]
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}


def _nodes(kind):
  return [
    node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, kind)
  ]


def _is_dataclass(node):
  return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _fields(node):
  return [
    item.target.id
    for item in node.body
    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
  ]


def test_every_field_is_read_somewhere():
  reads = {n.attr for n in _nodes(ast.Attribute) if isinstance(n.ctx, ast.Load)}
  reads |= {n.value for n in _nodes(ast.Constant) if isinstance(n.value, str)}
  classes = [n for n in _nodes(ast.ClassDef) if _is_dataclass(n)]
  assert len(classes) > 20
  dead = {
    f"{node.name}.{field}"
    for node in classes
    for field in _fields(node)
    if field not in reads and field != "_"
  }
  assert dead == {"Loop.sample_every"}  # read as f"{what}_every"


def _is_interface(function):
  """Whether a body is a docstring, `...` or a raise and nothing else."""
  return all(
    isinstance(statement, ast.Expr | ast.Raise | ast.Pass)
    for statement in function.body
  )


def _reads(function):
  return {
    node.id
    for node in ast.walk(function)
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store)
  }


def test_every_keyword_of_a_function_is_read_by_it():
  """What an interface forces on a function is named by `del` there."""
  functions = _nodes(ast.FunctionDef)
  assert len(functions) > 300
  dead = {
    f"{function.name}({argument.arg})"
    for function in functions
    if not _is_interface(function)
    for argument in function.args.kwonlyargs
    if argument.arg not in _reads(function)
  }
  assert not dead


@pytest.mark.usefixtures("unchecked")
def test_the_network_reads_its_whole_config():
  reads = set()

  class Watched(models.WanConfig):
    def __getattribute__(self, name):
      reads.add(name)
      return super().__getattribute__(name)

  x, t, text = jnp.ones((1, 2, 2, 2, 4)), jnp.ones((1, 2)), jnp.ones((1, 3, 6))
  settings = dict(layers=1, width=8, heads=2, ffn_width=8, freq_width=8)
  model = models.Wan(
    Watched(
      **settings,
      text_width=6,
      text_length=3,
      in_channels=4,
      out_channels=4,
      remat="full",
    )
  )
  reads.clear()  # __post_init__ reads what it checks.
  jax.eval_shape(
    lambda key: model.init(key, x, t, text, pattern=ChunkPattern(1, 1)),
    jax.random.key(0),
  )
  fields = {field.name for field in dataclasses.fields(models.WanConfig)}
  assert fields <= reads, fields - reads
