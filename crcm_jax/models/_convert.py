"""Checkpoint files into checkpoint files, one parameter in memory at a time."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from crcm_jax.models._about import check_about, describe, METADATA, tuples
from crcm_jax.models._tensor_files import (
  open_tensors,
  write_tensors,
)
from crcm_jax.models._torch import (
  lazy_from_torch,
  lazy_to_torch,
  NETWORKS,
  torch_metadata,
)
from crcm_jax.models._torch_file import LazyTensor


def convert(
  source: str | os.PathLike[str],
  out: str | os.PathLike[str],
  *,
  layout: str = "crcm",
  config: Any = None,
  group: str | None = None,
  dtype: Any = None,
  about: Mapping[str, Any] | None = None,
  force: bool = False,
) -> None:
  """Converts a checkpoint to our layout or to one of PyTorch projects.

  Args:
    source: a checkpoint that `params_from_torch` reads, or one of ours.
    out: the file to write, `*.safetensors`.
    layout: "crcm", ours; or one of `params_to_torch`.
    config: the network's config; None reads it off the checkpoint.
    group: which of several networks to take (see `params_from_torch`).
    dtype: dtype to store; None keeps it.
    about: what the weights are for: their `stage`, chunk `pattern`, `sampling`
      schedules. It is kept in the file, with what `source` says of itself.
    force: whether `about` may contradict what `source` says.

  Raises:
    FileNotFoundError: if `source` or a shard of it is missing.
    ValueError: if `source` is broken or of another kind, or contradicts
      `about`; if `layout` is unknown.
  """
  file = open_tensors(pathlib.Path(source))
  known = json.loads(file.metadata.get(METADATA, "{}"))
  check_about(known, None if force else about)
  if any("/" in key for key in file.tensors):
    config = config_from(known) if config is None else config
    params = _cast(file.tensors, dtype)
  else:
    config, params = lazy_from_torch(file, config, dtype=dtype, group=group)
  kind = next(n.name for n in NETWORKS if isinstance(config, n.config))
  known |= {**(about or {}), "kind": kind, "network": describe(config)}
  if layout == "crcm":
    metadata = {METADATA: json.dumps(known)}
  else:
    params = lazy_to_torch(params, config, layout)
    metadata = torch_metadata(known)
  write_tensors(pathlib.Path(out), params, metadata)


def config_from(about: Mapping[str, Any]) -> Any:
  """Returns the config of the network that a file of ours describes.

  Args:
    about: what the file says of itself, as `load_params` returns it.

  Returns:
    A `WanConfig`, `VaeConfig` or `TextConfig`.

  Raises:
    ValueError: if the file does not say.

  Example:
    >>> config_from({"network": dict(layers=2, width=32, heads=2, ffn_width=64,
    ...                              text_width=8, text_length=4)}).head_width
    16
  """
  if "network" not in about:
    raise ValueError(
      "`about` must have the entry `network`, the sizes of the network; got"
      f" {sorted(about)}. Pass the config that the weights were trained with."
    )
  kind = about.get("kind", NETWORKS[0].name)
  network = next(n for n in NETWORKS if n.name == kind)
  fields = {name: tuples(v) for name, v in about["network"].items()}
  return network.config(**fields)


def _cast(
  tensors: Mapping[str, LazyTensor], dtype: Any
) -> dict[str, LazyTensor]:
  if dtype is None:
    return dict(tensors)

  def one(tensor: LazyTensor) -> LazyTensor:
    read = lambda: tensor.read().astype(dtype)
    return tensor._replace(dtype=dtype, read=read)

  return {path: one(tensor) for path, tensor in tensors.items()}
