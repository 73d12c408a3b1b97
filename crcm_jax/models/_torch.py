"""Parameters to and from the files of PyTorch projects.

The kind of network and the layout show in the keys; `_wan_keys`, `_vae_keys`
and `_text_keys` list them. A checkpoint is checked as a whole, by names and
shapes, before any of it is read; then one array of ours after the other is
read, stacked, and put where it shall live, so that host memory holds no more
than the largest of them.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Params
from crcm_jax.models._about import check_about, METADATA
from crcm_jax.models._checkpoint import flatten, unflatten
from crcm_jax.models._keys import Entry, Network
from crcm_jax.models._tensor_files import (
  in_memory,
  open_tensors,
  TensorFile,
  write_tensors,
)
from crcm_jax.models._text_keys import TEXT
from crcm_jax.models._torch_file import LazyTensor
from crcm_jax.models._vae_keys import VAE
from crcm_jax.models._wan_keys import WAN

StateDict: TypeAlias = Mapping[str, np.ndarray]
Source: TypeAlias = StateDict | str | os.PathLike[str]

NETWORKS = (WAN, VAE, TEXT)

_WRAPPERS = re.compile(
  r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod"
  r"|module)\."
)


class _Found(NamedTuple):
  """The network of a checkpoint."""

  network: Network
  layout: str
  tensors: Mapping[str, LazyTensor]


def params_from_torch(
  state_dict_or_path: Source,
  config: Any = None,
  *,
  dtype: Any = None,
  group: str | None = None,
  shardings: Callable[[Params], Params] | None = None,
  expect: Mapping[str, Any] | None = None,
) -> tuple[Any, Params]:
  """Converts the checkpoint of a PyTorch project.

  It is a Wan transformer, autoencoder or text encoder, in the original's
  layout or that of diffusers and transformers. Wrappers around the keys
  (`net.`, `model.`, `generator_ema.`, `_fsdp_wrapped_module.`, ...) are
  removed. No code in a pickle is run, and torch is not needed.

  Args:
    state_dict_or_path: arrays by key, or a path: a `.safetensors`, `.pt` or
      `.pth` file, the index of shards, or a folder with one of these.
    config: the network's config; None reads the sizes off the arrays, taking
      heads to be 128 wide and prompts 512 long as every released Wan has.
    dtype: dtype of the parameters; None keeps that of the arrays.
    group: which of several networks to take, the start of its keys, such as
      "generator_ema".
    shardings: gives each parameter's sharding, of the tree of their shapes:
      `lambda shapes: sharding.shard(shapes, mesh, rules)`. None puts all on
      the default device.
    expect: what a file of ours must say of itself where it says anything,
      such as `{"pattern": {"first": 1, "rest": 3}}`.

  Returns:
    The config, and the parameters of `Wan`, `Vae` or `TextEncoder`.

  Raises:
    FileNotFoundError: if the file or a shard of it is missing.
    ValueError: if the file is broken or of another format; if it holds several
      networks and `group` names none of them; if keys are missing, surplus or
      of another shape, all of which are named; if the file contradicts
      `expect`.
  """
  file = _open(state_dict_or_path)
  check_about(_about(file), expect)
  config, lazy = lazy_from_torch(file, config, dtype=dtype, group=group)
  if shardings is None:
    return config, unflatten(
      {p: jnp.asarray(v.read()) for p, v in lazy.items()}
    )
  shape = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)
  shapes = unflatten({path: shape(v) for path, v in lazy.items()})
  where = flatten(shardings(shapes))
  put = lambda path: jax.device_put(lazy[path].read(), where[path])
  return config, unflatten({path: put(path) for path in lazy})


def params_to_torch(
  params: Params, config: Any, *, layout: str = "wan"
) -> dict[str, np.ndarray]:
  """Inverts `params_from_torch`.

  Args:
    params: parameters of `Wan`, `Vae` or `TextEncoder`.
    config: its config, which tells the network.
    layout: naming of the keys: "wan", the original's; "diffusers"; of a
      transformer also "rcm", as "wan" with a Linear for the input layer.

  Returns:
    Arrays by key. `save_torch` writes them to a file.

  Raises:
    ValueError: if `layout` is unknown.
  """
  lazy = lazy_to_torch(in_memory(flatten(params)).tensors, config, layout)
  return {key: tensor.read() for key, tensor in lazy.items()}


def save_torch(
  path: str | os.PathLike[str],
  params: Params,
  config: Any,
  about: Mapping[str, Any],
  *,
  layout: str = "wan",
  dtype: Any = None,
) -> None:
  """Writes parameters for PyTorch, as safetensors.

  Args:
    path: the file, `*.safetensors`; it is moved there when complete.
    params: parameters of `Wan`, `Vae` or `TextEncoder`.
    config: its config.
    about: what the network is for, anything JSON can hold: its `stage`, chunk
      `pattern`, `sampling` schedules. `params_from_torch(expect=)` and
      `torch_about` read it.
    layout: naming of the keys (see `params_to_torch`).
    dtype: dtype to store; None keeps it.

  Raises:
    ValueError: if `layout` is unknown.
  """
  lazy = in_memory(flatten(params)).tensors
  lazy = lazy_to_torch(lazy, config, layout, dtype=dtype)
  write_tensors(pathlib.Path(path), lazy, torch_metadata(about))


def torch_about(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns what a checkpoint says of itself, {} if it is not one of ours."""
  return _about(_open(path))


def torch_metadata(about: Mapping[str, Any]) -> dict[str, str]:
  """Returns the metadata of a file for PyTorch."""
  return {"format": "pt", METADATA: json.dumps(dict(about))}


def lazy_from_torch(
  file: TensorFile,
  config: Any = None,
  *,
  dtype: Any = None,
  group: str | None = None,
) -> tuple[Any, dict[str, LazyTensor]]:
  """Checks a checkpoint and maps it to our parameters, reading none of it.

  Args:
    file: the open checkpoint.
    config: as for `params_from_torch`.
    dtype: as for `params_from_torch`.
    group: as for `params_from_torch`.

  Returns:
    The config, and our parameters by path.

  Raises:
    ValueError: as for `params_from_torch`.
  """
  found = _recognise(file.tensors, group)
  if config is None:
    config = _infer(found)
  if not isinstance(config, found.network.config):
    raise ValueError(
      f"`config` must be a {found.network.config.__name__}, the checkpoint is"
      f" a Wan {found.network.name}; got a {type(config).__name__}."
    )
  table = found.network.table(config, found.layout)
  _check(found, table)
  parts: dict[str, list[tuple[LazyTensor, Entry]]] = {}
  for key, entry in table.items():
    parts.setdefault(entry.path, []).append((found.tensors[key], entry))
  return config, {path: _stacked(part, dtype) for path, part in parts.items()}


def lazy_to_torch(
  params: Mapping[str, LazyTensor],
  config: Any,
  layout: str,
  *,
  dtype: Any = None,
) -> dict[str, LazyTensor]:
  """Maps our parameters to torch keys, reading each once, in order.

  Args:
    params: our parameters by path.
    config: as for `params_to_torch`.
    layout: as for `params_to_torch`.
    dtype: dtype to give them; None keeps it.

  Returns:
    Tensors by torch key, those of one parameter after each other.

  Raises:
    ValueError: if `layout` is unknown.
  """
  network = next(n for n in NETWORKS if isinstance(config, n.config))
  if layout not in network.anchors:
    raise ValueError(
      f"`layout` must be one of {sorted(network.anchors)} for a Wan"
      f" {network.name}; got {layout!r}."
    )

  @functools.lru_cache(maxsize=1)  # its layers are asked for one after another
  def whole(path: str) -> np.ndarray:
    return np.asarray(params[path].read())

  def one(entry: Entry) -> LazyTensor:
    def read() -> np.ndarray:
      value = whole(entry.path)
      value = value if entry.layer is None else value[entry.layer]
      return np.ascontiguousarray(entry.to_torch(value).astype(kept))

    kept = np.dtype(dtype or params[entry.path].dtype)
    return LazyTensor(entry.shape, kept, read)

  table = network.table(config, layout)
  order = {path: i for i, path in enumerate(params)}
  keys = sorted(table, key=lambda key: order[table[key].path])
  return {key: one(table[key]) for key in keys}


def _about(file: TensorFile) -> dict[str, Any]:
  return json.loads(file.metadata.get(METADATA, "{}"))


def _open(source: Source) -> TensorFile:
  if isinstance(source, Mapping):
    return in_memory(source)
  return open_tensors(pathlib.Path(source))


def _recognise(tensors: Mapping[str, LazyTensor], group: str | None) -> _Found:
  """Finds the network by a key that only it has, and strips its prefix."""
  tensors = {_WRAPPERS.sub("", key): value for key, value in tensors.items()}
  found: dict[str, tuple[Network, str]] = {}
  for network in NETWORKS:
    for layout, anchor in network.anchors.items():
      for key in tensors:
        prefix = key.removesuffix(anchor)
        if prefix != key and (not prefix or prefix.endswith(".")):
          found.setdefault(prefix, (network, layout))
  prefix = _choose(sorted(found), group, tensors)
  network, layout = found[prefix]
  inner = {
    key.removeprefix(prefix): value
    for key, value in tensors.items()
    if key.startswith(prefix)
    and not re.fullmatch(network.unused, key.removeprefix(prefix))
  }
  for alias, key in network.aliases.items():
    if alias in inner:
      inner.setdefault(key, inner[alias])
      del inner[alias]
  return _Found(network, layout, inner)


def _choose(
  prefixes: list[str], group: str | None, tensors: Mapping[str, Any]
) -> str:
  if not prefixes:
    raise ValueError(
      "`state_dict_or_path` must hold a Wan transformer, autoencoder or text"
      " encoder, in the original's layout or that of diffusers; found"
      f" {sorted(tensors)[:3]} and {max(len(tensors) - 3, 0)} other keys."
      " Weights of this library are read by `load_params`."
    )
  if group is not None:
    prefixes = [p for p in prefixes if f"{p}.".startswith(f"{group}.")]
  if len(prefixes) == 1:
    return prefixes[0]
  names = [prefix.removesuffix(".") for prefix in prefixes]
  raise ValueError(
    "`group` must name one of the networks in the checkpoint, by the start of"
    f" its keys; got {group!r}, which fits {names or 'none of them'}."
  )


def _infer(found: _Found) -> Any:
  shapes = {key: tensor.shape for key, tensor in found.tensors.items()}
  try:
    return found.network.infer(shapes, found.layout)
  except KeyError as error:
    raise ValueError(
      "`state_dict_or_path` must hold all keys of a Wan"
      f" {found.network.name}; missing {error}, found {sorted(shapes)[:3]} and"
      " others. Pass a `config` to learn of everything that is missing."
    ) from error


def _check(found: _Found, table: Mapping[str, Entry]) -> None:
  """Names every key that is missing, surplus, or of another shape."""
  tensors = found.tensors
  faults = [f"missing {key}" for key in table if key not in tensors]
  faults += [f"surplus {key}" for key in tensors if key not in table]
  for key in table.keys() & tensors.keys():
    shape, entry = tuple(tensors[key].shape), table[key]
    if not entry.accepts(shape):
      faults.append(f"{key} has shape {shape}, expected {entry.shape}")
  if faults:
    raise ValueError(
      f"`state_dict_or_path` must hold the keys of a Wan {found.network.name}"
      " of this `config`; " + "; ".join(sorted(faults)) + ". Pass the `config`"
      " the weights were trained with."
    )


def _stacked(parts: list[tuple[LazyTensor, Entry]], dtype: Any) -> LazyTensor:
  """One parameter of ours: one tensor, or one a layer."""
  first, entry = parts[0]
  dtype = np.dtype(dtype or first.dtype)
  # A view of one number stands for the array, which is not read.
  like = np.broadcast_to(np.int8(0), entry.shape)
  shape = entry.to_ours(like).shape

  def part(i: int) -> np.ndarray:
    tensor, entry = parts[i]
    return entry.to_ours(tensor.read()).astype(dtype, copy=False)

  def stack() -> np.ndarray:
    stacked = np.empty((len(parts), *shape), dtype)
    for i in range(len(parts)):
      stacked[i] = part(i)
    return stacked

  if entry.layer is None:
    return LazyTensor(shape, dtype, lambda: part(0))
  return LazyTensor((len(parts), *shape), dtype, stack)
