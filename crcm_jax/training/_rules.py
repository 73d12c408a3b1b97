"""Which mesh axes split which dimensions of a Wan network's arrays, as data.

A rule is a regular expression for the path of an array and, for each of its
dimensions, the mesh axis or axes that split it. The first rule that matches
decides. Optimizer moments and moving averages have the parameters' paths in
theirs, and so the same rules.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from crcm_jax.training._config import did_you_mean

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")
"""The axes that split examples."""

Axes: TypeAlias = Sequence[str | Sequence[str] | None]
AnyMesh: TypeAlias = Mesh | AbstractMesh
Rules: TypeAlias = Sequence[tuple[str, Axes]]
"""Pairs of a regular expression and the mesh axes of each dimension."""

REPLICATED: Rules = ((".*", ()),)
"""Every device holds everything."""

_IN_COLUMNS = ".*attention/(image_)?(query|key|value)|ffn/up"
_IN_ROWS = ".*attention/out|ffn/down"
_NORMS = ".*attention/(image_)?(query|key)_norm"
_LAYER = r"(layer|network/.*blocks/layer_\d+)"

WAN_RULES: Rules = (
  # Layers are stacked: [layers, in, out]. Columns, then rows, over `tensor`:
  # the features between them, heads among them, are never gathered.
  (f".*blocks/({_IN_COLUMNS})/kernel", (None, "fsdp", "tensor")),
  (f".*blocks/({_IN_ROWS})/kernel", (None, "tensor", "fsdp")),
  (f".*blocks/({_IN_COLUMNS})/bias", (None, "tensor")),
  (f".*blocks/{_NORMS}/scale", (None, "tensor")),
  (".*", ()),
)
"""Layers split over `fsdp` and `tensor`; the little outside them is whole."""

NAMED: Mapping[str, Rules] = {"replicated": REPLICATED, "wan": WAN_RULES}
"""Sets of rules by the names that configs give them."""

ROLES: Mapping[str, str] = {
  "student": "(student|student_opt_state|ema)",
  "fake": "(fake|fake_opt_state)",
  "teacher": "teacher",
  "real": "real",
}
"""The roles of networks, and where paths with their parameters begin."""

_ACTIVATIONS: Rules = (
  ("tokens.*", (BATCH, None, "context")),
  ("patches", (BATCH,)),  # latents are small, and whole
  # A layer's parameters, gathered from `fsdp` as it begins.
  (f"{_LAYER}/({_IN_COLUMNS})/kernel", (None, "tensor")),
  (f"{_LAYER}/({_IN_ROWS})/kernel", ("tensor",)),
  (f"{_LAYER}/(({_IN_COLUMNS})/bias|{_NORMS}/scale)", ("tensor",)),
  (f"{_LAYER}/.*attention/query_key_value/kernel", (None, None, "tensor")),
  (f"{_LAYER}/.*attention/query_key_value/bias", (None, "tensor")),
  # Those of all layers, [layers, in, out], gathered as a rollout begins.
  (f"network/.*blocks/({_IN_COLUMNS})/kernel", (None, None, "tensor")),
  (f"network/.*blocks/({_IN_ROWS})/kernel", (None, "tensor")),
  (f"network/.*blocks/({_IN_COLUMNS})/bias", (None, "tensor")),
  (f"network/.*blocks/{_NORMS}/scale", (None, "tensor")),
  (r"cache/text/\d+/.*", (BATCH, None, "tensor")),  # of one layer
  ("cache/text/.*", (None, BATCH, None, "tensor")),
)


def activation_rules(cache: Axes) -> Rules:
  """Returns the rules of what a step computes.

  Args:
    cache: how a rollout's cache lies, `[layers b f p n d]`.
  """
  return (*_ACTIVATIONS, ("cache/past/.*", cache), (".*", ()))


CACHE_WHOLE: Axes = (None, BATCH, None, None, "tensor")
"""All tokens on all devices along `context`, which attend to them without
asking each other."""

CACHE_BY_HEADS: Axes = (None, BATCH, None, None, ("tensor", "context"))
"""As attention reads it after swapping tokens for heads, where they divide."""

CACHE_BY_TOKENS: Axes = (None, BATCH, None, "context", "tensor")
"""Where heads do not divide: such a cache travels each time it is read."""


def read_rules(setting: Any) -> Rules:
  """Returns the rules that a config's `sharding` stands for.

  Args:
    setting: the name of a set (`NAMED`); or rules; or either for some roles,
      `dict(student="wan", real=((PATTERN, AXES), ...))`: then the patterns are
      of the parameters' own paths, and the roles left out have `WAN_RULES`.

  Raises:
    ValueError: if there is no such set, role or mesh axis.
  """
  if isinstance(setting, str):
    return _one_of(NAMED, setting, "config.sharding")
  if not isinstance(setting, Mapping):
    return tuple(map(_read_rule, setting))
  rules = []
  for role, of_role in setting.items():
    start = _one_of(ROLES, role, "config.sharding")
    rules += [
      (f"{start}/(.*/)?({pattern})", axes)
      for pattern, axes in read_rules(of_role)
    ]
  return (*rules, *WAN_RULES)


def _read_rule(rule: Any) -> tuple[str, Axes]:
  try:
    pattern, axes = rule
    re.compile(pattern)
  except (TypeError, ValueError, re.error) as error:
    raise ValueError(
      "`config.sharding` must have rules (REGULAR EXPRESSION, AXES); got"
      f" {rule!r}: {error}."
    ) from error
  return pattern, _read_axes(pattern, axes)


def _read_axes(pattern: str, axes: Axes) -> Axes:
  for of_dimension in axes:
    one = isinstance(of_dimension, str)
    for axis in (of_dimension,) if one else of_dimension or ():
      if axis not in AXES:
        raise ValueError(
          "`config.sharding` must split dimensions by axes of the mesh,"
          f" {[*AXES]}, or None; got {axis!r} in the rule of"
          f" {pattern!r}{did_you_mean(str(axis), AXES)}."
        )
  return tuple(axes)


def _one_of(choices: Mapping[str, Any], name: str, what: str) -> Any:
  if name not in choices:
    raise ValueError(f"`{what}` must name one of {[*choices]}; got {name!r}.")
  return choices[name]


def name_of(path: Any) -> str:
  """Returns the name that rules match, of a leaf's path in a pytree."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def spec_of(name: str, rules: Rules) -> PartitionSpec:
  """Returns the axes of the first rule that matches.

  Raises:
    ValueError: if none does.
  """
  _, axes = first_match(name, rules)
  return PartitionSpec(*map(_hashable, axes))


def first_match(name: str, rules: Rules) -> tuple[str, Axes]:
  """Returns the first rule that matches.

  Raises:
    ValueError: if none does.
  """
  for pattern, axes in rules:
    if re.fullmatch(pattern, name):
      return pattern, axes
  raise ValueError(
    f"`rules` must match every leaf; none matches {name!r}. End them with"
    " ('.*', ())."
  )


def _hashable(axes: Any) -> Any:
  return tuple(axes) if isinstance(axes, list) else axes
