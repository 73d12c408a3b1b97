"""Parameters to and from the key layout of original Wan checkpoints.

A torch Linear holds its weight as [out, in]; ours is [in, out]. Layers, keys
`blocks.<i>.*` there, are stacked along axis 0 here. The input layer's features
run channel slowest there (a Conv3d, flattened or not), channel fastest here.
Every map is linear, so gradients convert as parameters do.
"""

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Params
from crcm_jax.models._checkpoint import flatten, read_tensors, unflatten
from crcm_jax.models._config import WanConfig

StateDict: TypeAlias = Mapping[str, np.ndarray]


class _Entry(NamedTuple):
  """One torch key: where it goes, its shape, and the two maps of its value."""

  path: str
  layer: int | None
  shape: tuple[int, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_torch: Callable[[np.ndarray], np.ndarray]


def params_from_torch(
  state_dict_or_path: StateDict | str | os.PathLike[str],
  config: WanConfig | None = None,
  *,
  dtype: Any = None,
) -> tuple[WanConfig, Params]:
  """Converts an original Wan checkpoint.

  Args:
    state_dict_or_path: arrays by key, or the path of a `.safetensors` file.
    config: the network's config; None reads the sizes off the arrays, taking
      heads to be 128 wide and prompts 512 long as every released Wan has.
    dtype: dtype of the parameters; None keeps that of the arrays.

  Returns:
    The config, and the parameters of `Wan`.

  Raises:
    ValueError: if keys are missing, surplus or of another shape; all of them
      are named.
  """
  state = _read(state_dict_or_path)
  if config is None:
    config = _infer_config(state)
  table = _table(config)
  _check(state, table)
  flat: dict[str, Any] = {}
  for key, entry in table.items():
    value = entry.to_ours(np.asarray(state[key]))
    value = value if dtype is None else value.astype(dtype)
    if entry.layer is None:
      flat[entry.path] = value
    else:
      flat.setdefault(entry.path, []).append(value)
  stack = lambda v: jnp.asarray(np.stack(v) if isinstance(v, list) else v)
  return config, unflatten({path: stack(v) for path, v in flat.items()})


def params_to_torch(
  params: Params, config: WanConfig, *, layout: str = "wan"
) -> dict[str, np.ndarray]:
  """Inverts `params_from_torch`.

  Args:
    params: parameters of `Wan`.
    config: its config.
    layout: naming of the keys; `"wan"`, the original's.

  Returns:
    Arrays by key; save them with `safetensors.numpy.save_file`.

  Raises:
    ValueError: if `layout` is unknown.
  """
  if layout != "wan":
    raise ValueError(f'`layout` must be "wan"; got {layout!r}.')
  flat = {path: np.asarray(value) for path, value in flatten(params).items()}
  pick = lambda e: flat[e.path] if e.layer is None else flat[e.path][e.layer]
  return {
    key: np.ascontiguousarray(entry.to_torch(pick(entry)))
    for key, entry in _table(config).items()
  }


def _read(source: StateDict | str | os.PathLike[str]) -> StateDict:
  if isinstance(source, Mapping):
    return source
  return read_tensors(pathlib.Path(source))[0]


_MLPS = {"0": "up", "2": "down"}
_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def _table(config: WanConfig) -> dict[str, _Entry]:
  """Lists every torch key of a network."""
  d, table = config.width, {}
  same = lambda a: a
  pixels = config.patch[1] * config.patch[2]

  def vector(key: str, path: str, layer: int | None = None):
    table[key] = _Entry(path, layer, (d,), same, same)

  def linear(
    key: str, path: str, inputs: int, outputs: int, layer: int | None = None
  ):
    table[f"{key}.weight"] = _Entry(
      f"{path}/kernel", layer, (outputs, inputs), np.transpose, np.transpose
    )
    table[f"{key}.bias"] = _Entry(f"{path}/bias", layer, (outputs,), same, same)

  def modulation(key: str, path: str, rows: int, layer: int | None = None):
    table[key] = _Entry(
      path, layer, (1, rows, d), lambda a: a[0], lambda a: a[None]
    )

  def attention(key: str, path: str, layer: int):
    for theirs, ours in _PROJECTIONS.items():
      linear(f"{key}.{theirs}", f"{path}/{ours}", d, d, layer)
    vector(f"{key}.norm_q.weight", f"{path}/query_norm/scale", layer)
    vector(f"{key}.norm_k.weight", f"{path}/key_norm/scale", layer)

  linear("patch_embedding", "patch_embedding", pixels * config.in_channels, d)
  table["patch_embedding.weight"] = _patch_entry(config)
  linear("text_embedding.0", "text_embedding/up", config.text_width, d)
  linear("text_embedding.2", "text_embedding/down", d, d)
  linear("time_embedding.0", "time_embedding/up", config.freq_width, d)
  linear("time_embedding.2", "time_embedding/down", d, d)
  if config.end_time:  # Ours: no released Wan has it.
    linear("end_embedding.0", "end_embedding/up", config.freq_width, d)
    linear("end_embedding.2", "end_embedding/down", d, d)
  linear("time_projection.1", "time_projection", d, 6 * d)
  for i in range(config.layers):
    block = f"blocks.{i}"
    modulation(f"{block}.modulation", "blocks/modulation", 6, i)
    attention(f"{block}.self_attn", "blocks/self_attention", i)
    vector(f"{block}.norm3.weight", "blocks/cross_norm/scale", i)
    vector(f"{block}.norm3.bias", "blocks/cross_norm/bias", i)
    attention(f"{block}.cross_attn", "blocks/cross_attention", i)
    linear(f"{block}.ffn.0", "blocks/ffn/up", d, config.ffn_width, i)
    linear(f"{block}.ffn.2", "blocks/ffn/down", config.ffn_width, d, i)
  modulation("head.modulation", "head/modulation", 2)
  linear("head.head", "head/out", d, pixels * config.out_channels)
  return table


def _patch_entry(config: WanConfig) -> _Entry:
  """The input layer: [out, c y x] there, [y x c, out] here."""
  _, y, x = config.patch
  c, d = config.in_channels, config.width

  def to_ours(a: np.ndarray) -> np.ndarray:
    return a.reshape(d, c, y, x).transpose(2, 3, 1, 0).reshape(-1, d)

  def to_torch(a: np.ndarray) -> np.ndarray:
    return a.reshape(y, x, c, d).transpose(3, 2, 0, 1).reshape(d, -1)

  return _Entry(
    "patch_embedding/kernel", None, (d, c * y * x), to_ours, to_torch
  )


def _check(state: StateDict, table: Mapping[str, _Entry]) -> None:
  """Names every key that is missing, surplus, or of another shape."""
  faults = [f"missing {key}" for key in table if key not in state]
  faults += [f"surplus {key}" for key in state if key not in table]
  for key in table.keys() & state.keys():
    shape, expected = tuple(state[key].shape), table[key].shape
    if key == "patch_embedding.weight":  # a Conv3d, flattened or not
      shape = (shape[0], int(np.prod(shape[1:])))
    if shape != expected:
      faults.append(f"{key} has shape {shape}, expected {expected}")
  if faults:
    raise ValueError(
      "`state_dict_or_path` must hold the keys of a Wan network of this"
      " `config`; " + "; ".join(sorted(faults)) + ". Pass the `config` the"
      " weights were trained with (`WanConfig.from_wan(its config.json)`)."
    )


def _infer_config(state: StateDict) -> WanConfig:
  """Reads sizes off the arrays."""
  needed = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
  )
  missing = [key for key in needed if key not in state]
  if missing:
    raise ValueError(
      "`state_dict_or_path` must hold the original Wan keys; missing"
      f" {missing}, found {sorted(state)[:3]} and others. Strip any prefix"
      " from the keys."
    )
  shape = {key: state[key].shape for key in needed}
  width = shape["patch_embedding.weight"][0]
  if width % 128:
    raise ValueError(
      "`config` must be given for a width that is no multiple of 128, since"
      f" the heads cannot be told from the arrays; got width {width}. Pass"
      " `WanConfig.from_wan(its config.json)`."
    )
  blocks = {m[1] for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
  return WanConfig(
    layers=len(blocks),
    width=width,
    heads=width // 128,
    ffn_width=shape["blocks.0.ffn.0.weight"][0],
    freq_width=shape["time_embedding.0.weight"][1],
    text_width=shape["text_embedding.0.weight"][1],
    text_length=512,
    end_time="end_embedding.0.weight" in state,
    in_channels=int(np.prod(shape["patch_embedding.weight"][1:])) // 4,
    out_channels=shape["head.head.weight"][0] // 4,
  )
