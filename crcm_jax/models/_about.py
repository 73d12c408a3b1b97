"""What a weights file says of itself, and whether that fits its new use.

It is a JSON block in the file's metadata. Entries that matter when weights are
used again: `stage`, `pattern` (how latent frames form chunks), `sampling` (its
schedules), `network` (the config). A network run with other chunks or other
times than it was trained for gives poor video without any error.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

METADATA = "crcm_jax"
"""The block's key in the metadata of a safetensors file."""


def check_about(
  about: Mapping[str, Any], expect: Mapping[str, Any] | None
) -> None:
  """Refuses a file that contradicts what is expected of it.

  Args:
    about: what the file says.
    expect: entries it must agree with; of dicts, the entries named. What the
      file does not mention is not checked. None checks nothing.

  Raises:
    ValueError: if an entry differs; all that do are named.
  """
  faults = list(_differences("", about, expect or {}))
  if faults:
    raise ValueError(
      "`expect` must agree with what the weights were trained for; "
      + "; ".join(faults)
      + ". Use them as they were trained, or pass `expect=None`."
    )


def _differences(
  path: str, about: Mapping[str, Any], expect: Mapping[str, Any]
):
  for key in about.keys() & expect.keys():
    name, got, wanted = f"{path}{key}", about[key], expect[key]
    if isinstance(got, Mapping) and isinstance(wanted, Mapping):
      yield from _differences(f"{name}.", got, wanted)
    elif _plain(got) != _plain(wanted):
      yield f"{name} is {got}, expected {wanted}"


def _plain(value: Any) -> Any:
  """Turns tuples into lists, as JSON does."""
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  return value


def describe(config: Any) -> dict[str, Any]:
  """Returns a config's fields as JSON holds them.

  Args:
    config: a dataclass whose fields are plain values or dtypes.
  """
  fields = dataclasses.asdict(config)
  names = {k: v.name for k, v in fields.items() if isinstance(v, np.dtype)}
  return fields | names


def tuples(value: Any) -> Any:
  """Turns JSON's lists into tuples, as the fields of configs are."""
  if isinstance(value, list):
    return tuple(tuples(v) for v in value)
  return value
