"""Experiment configs: loading, overriding, and reading with nothing left over.

A config is the `ml_collections.ConfigDict` that `get_config(variant)` of a
Python file returns. Each of its sections is the keyword arguments of one call,
so that a config says nothing which code does not take, and the code has no
second list of settings. `Section` reads it: a key that its call does not know,
or that nothing reads, is an error and not a setting that silently does nothing.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import ml_collections


def load_config(
  spec: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Loads a config file and applies the command line's changes to it.

  Args:
    spec: `FILE.py` or `FILE.py:VARIANT`; the variant is the argument of the
      file's `get_config`.
    overrides: changes such as `"optimizer.learning_rate=1e-4"`.

  Returns:
    The locked config.

  Raises:
    ValueError: if the file or its `get_config` is missing, or a change names
      no key of the config or has a value of another type.
  """
  path, _, variant = spec.partition(":")
  get_config = _get_config_of(pathlib.Path(path))
  config = get_config(variant) if variant else get_config()
  for change in overrides:
    _override(config, change)
  return config.lock()


def _get_config_of(path: pathlib.Path) -> Callable[..., Any]:
  if not path.is_file():
    raise ValueError(
      f"`--config` must name a Python file; there is none at {str(path)!r}."
    )
  module_spec = importlib.util.spec_from_file_location(
    f"crcm_config_{path.stem}", path
  )
  assert module_spec is not None
  assert module_spec.loader is not None
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(
      f"`--config` {str(path)!r} must define `get_config(variant)`; add it."
    )
  return module.get_config


def _override(config: ml_collections.ConfigDict, change: str) -> None:
  """Applies `KEY=VALUE`; the value must have the type of the old one."""
  key, equals, text = change.partition("=")
  known = flatten(config)
  if not equals or key not in known:
    raise ValueError(
      f"`--config.{change}` must be `--config.KEY=VALUE` with a key of the"
      f" config{did_you_mean(key, known)}."
    )
  *parents, name = key.split(".")
  section: Any = config
  for parent in parents:
    section = section[parent]
  with section.unlocked():
    section[name] = _parse(key, text, section[name])


def _parse(key: str, text: str, old: Any) -> Any:
  """Reads `text` as a value of the type of `old`."""
  if isinstance(old, str):
    return text
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError):
    value = text
  if isinstance(old, float) and type(value) is int:
    value = float(value)
  if old is not None and type(value) is not type(old):
    raise ValueError(
      f"`--config.{key}` must be of type {type(old).__name__}, as"
      f" {old!r} is; got {text!r}."
    )
  return value


class Section:
  """A part of a config that remembers which of its keys were read."""

  def __init__(self, values: Mapping[str, Any], name: str = "config"):
    """Wraps `values`, which messages call `name`."""
    self._name = name
    self._asked: set[str] = set()
    self._read: set[str] = set()
    self._values = {
      key: Section(value, f"{name}.{key}") if _is_mapping(value) else value
      for key, value in values.items()
    }

  def __contains__(self, key: str) -> bool:
    """Whether the section has `key`; asking does not count as reading."""
    self._asked.add(key)
    return key in self._values

  def __getitem__(self, key: str) -> Any:
    """Returns the value or section of `key`, which must be there."""
    if key not in self:
      raise ValueError(
        f"`{self._name}.{key}` is missing; the section has"
        f" {sorted(self._values)}{did_you_mean(key, self._values)}."
      )
    self._read.add(key)
    return self._values[key]

  def get(self, key: str, default: Any = None) -> Any:
    """Returns the value or section of `key`, or `default` without it."""
    if key not in self:
      return default
    return self[key]

  def take(self, key: str, default: Any = None) -> Any:
    """Returns the value of `key` with all it holds: no section, and read."""
    return _plain(self.get(key, default))

  def section(self, key: str) -> "Section":
    """Returns the section of `key`, an empty one where there is none."""
    return self[key] if key in self else Section({}, f"{self._name}.{key}")

  def call(self, function: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Calls `function` with all keys not read yet as keyword arguments.

    Args:
      function: what takes the section's keys as its arguments.
      *args: positional arguments to add.
      **more: keyword arguments to add, which the section may not hold.

    Returns:
      What the function returns.

    Raises:
      ValueError: if a key is not an argument of the function, naming the
        nearest one that is; or if an argument without default is missing.
    """
    settings = self.settings_of(function, more)
    signature = inspect.signature(function)
    try:
      signature.bind(*args, **settings, **more)
    except TypeError as error:
      raise ValueError(
        f"`{self._name}` must hold the settings of `{function.__name__}`:"
        f" {error}."
      ) from error
    return function(*args, **settings, **more)

  def settings_of(
    self, function: Callable[..., Any], more: Iterable[str] = ()
  ) -> dict[str, Any]:
    """Returns all keys not read yet, if `function` takes them.

    Args:
      function: what shall be called with them.
      more: names of its arguments that the section may not hold.

    Raises:
      ValueError: if a key is not an argument of the function, naming the
        nearest one that is.
    """
    keys = [key for key in self._values if key not in self._read]
    takes = _keywords(function)
    free = [name for name in takes if name not in more]
    for key in keys:
      if takes and key not in free:
        raise ValueError(
          f"`{self._name}.{key}` is not a setting of"
          f" `{function.__name__}`{did_you_mean(key, free)}; it takes {free}."
        )
    return {key: self.take(key) for key in keys}

  def choose(self, choices: Mapping[str, Any]) -> Any:
    """Returns the entry of `choices` that the key `name` names."""
    name = self["name"]
    if name not in choices:
      raise ValueError(
        f"`{self._name}.name` must be one of {sorted(choices)}; got"
        f" {name!r}{did_you_mean(name, choices)}."
      )
    return choices[name]

  def as_dict(self) -> dict[str, Any]:
    """Returns all keys with their values; they count as read."""
    return {key: self.take(key) for key in self._values}

  def unread(self) -> list[str]:
    """Lists the dotted names of the keys that nothing has read."""
    names = []
    for key, value in self._values.items():
      if key not in self._read:
        names.append(f"`{self._name}.{key}`{did_you_mean(key, self._asked)}")
      elif isinstance(value, Section):
        names.extend(value.unread())
    return names

  def check_all_read(self) -> None:
    """Raises ValueError if a key was never read."""
    if names := self.unread():
      raise ValueError(
        "every key of a config must be read by something; these are not: "
        + ", ".join(names)
        + ". Remove them, or correct their names."
      )


def _plain(value: Any) -> Any:
  """A value without sections and lists; the keys of sections count as read."""
  if isinstance(value, Section):
    return value.as_dict()
  if isinstance(value, list | tuple):
    return tuple(map(_plain, value))
  return value


def _is_mapping(value: Any) -> bool:
  return isinstance(value, Mapping | ml_collections.ConfigDict)


def _keywords(function: Callable[..., Any]) -> list[str]:
  """Names the keyword arguments, or nothing if any is taken."""
  parameters = inspect.signature(function).parameters.values()
  if any(p.kind is p.VAR_KEYWORD for p in parameters):
    return []
  return [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]


def check_whole(name: str, value: Any, least: int) -> None:
  """Raises ValueError unless a setting is a whole number, at least so large."""
  if not isinstance(value, int) or value < least:
    raise ValueError(
      f"`{name}` must be at least {least}, a whole number; got {value!r}."
    )


def did_you_mean(key: str, known: Iterable[str]) -> str:
  """Returns the end of a message that names the nearest key, if one is near."""
  near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
  return f" (did you mean `{near[0]}`?)" if near else ""


def as_dict(config: Any) -> dict[str, Any]:
  """Returns a config as plain JSON values: tuples become lists."""
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  return json.loads(json.dumps(config))


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
  """Returns `{"a.b": value}` of every value that is not a section."""
  flat = {}
  for key, value in config.items():
    if _is_mapping(value):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def differences(old: Any, new: Any) -> list[str]:
  """Lists the keys in which two configs differ, each with both values."""
  old, new = flatten(as_dict(old)), flatten(as_dict(new))
  absent = "absent"
  return [
    f"`{key}`: {old.get(key, absent)!r} -> {new.get(key, absent)!r}"
    for key in sorted(old.keys() | new.keys())
    if old.get(key, absent) != new.get(key, absent)
  ]


def config_hash(config: Any) -> str:
  """Returns 12 hexadecimal digits that name a config's content."""
  text = json.dumps(as_dict(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]
