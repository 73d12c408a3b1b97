"""The networks that make a video of a prompt: from a folder, or random."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import models
from crcm_jax._typing import Array, Float, Params

_GROUP = 8  # prompts embedded at a time
_BLOCK = 2**18  # random numbers drawn at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
  """All that makes a video of a prompt.

  Attributes:
    transformer: predicts velocities.
    params: its parameters.
    vae: decodes latents.
    vae_params: its parameters.
    embed: embeds prompts. It loads the text encoder when it has to, and keeps
      it no longer than the call.
    prepare: embeds prompts ahead, loading the encoder once, and keeps them on
      disk: afterwards `embed` need not load it.
    about: what the transformer's file says of itself.
    weights_hash: tells one transformer from another.
  """

  transformer: models.Wan
  params: Params
  vae: models.Vae
  vae_params: Params
  embed: models.Embed
  prepare: Callable[[Sequence[str]], None] = lambda prompts: None
  about: Mapping[str, Any]
  weights_hash: str


def load_networks(
  folder: str | os.PathLike[str],
  *,
  transformer: str | os.PathLike[str] | None = None,
  group: str | None = None,
  dtype: Any = jnp.bfloat16,
  cache: str | os.PathLike[str],
) -> Networks:
  """Reads the networks of a folder.

  Args:
    folder: see `models.find_networks`.
    transformer: another file or folder for the transformer, such as that of a
      distilled student.
    group: which of several networks to take of its file.
    dtype: dtype of parameters and matrix products.
    cache: folder where embeddings of prompts are kept.

  Raises:
    FileNotFoundError: if a part is missing; all that are, are named.
    ValueError: if a file is broken or of another kind.
  """
  places = models.find_networks(folder, transformer=transformer)
  config, params, about = _load(
    places["transformer"], models.WanConfig, dtype, group
  )
  vae, vae_params, _ = _load(places["autoencoder"], models.VaeConfig, dtype)
  embed = models.CachedEmbedder(
    _embedder(places, config.text_length, dtype),
    cache,
    identity=_quick_hash(places["text encoder"]),
  )
  return Networks(
    transformer=models.Wan(config),
    params=params,
    vae=models.Vae(vae),
    vae_params=vae_params,
    embed=embed,
    prepare=embed.prepare,
    about=about,
    weights_hash=_full_hash(places["transformer"]),
  )


def _load(
  path: pathlib.Path, kind: type, dtype: Any, group: str | None = None
) -> tuple[Any, Params, dict[str, Any]]:
  config, params, about = models.load_network(path, dtype=dtype, group=group)
  if not isinstance(config, kind):
    raise ValueError(
      f"{str(path)!r} must hold what a {kind.__name__} describes; got a"
      f" {type(config).__name__}. Give each network its own file."
    )
  return dataclasses.replace(config, dtype=dtype), params, about


def _embedder(places: Mapping[str, pathlib.Path], length: int, dtype: Any):
  def embed(prompts: Sequence[str]) -> Iterator[Float[np.ndarray, "l d"]]:
    tokenize = models.load_tokenizer(places["tokenizer"])
    config, params, _ = _load(places["text encoder"], models.TextConfig, dtype)
    encode = models.prompt_embedder(
      models.TextEncoder(config), params, tokenize, length=length
    )
    for i in range(0, len(prompts), _GROUP):
      yield from encode(prompts[i : i + _GROUP])

  return embed


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """Lists the files that a checkpoint's path stands for."""
  if path.is_dir():
    return sorted(p for p in path.iterdir() if p.is_file())
  if path.name.endswith(".index.json"):
    shards = set(json.loads(path.read_text())["weight_map"].values())
    return sorted(path.parent / name for name in shards)
  return [path]


def _full_hash(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file, or of those of its shards."""
  digests = []
  for name in _files(path):
    with name.open("rb") as file:
      digests.append(hashlib.file_digest(file, "sha256").hexdigest())
  if len(digests) == 1:
    return digests[0]
  return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _quick_hash(path: pathlib.Path, part: int = 2**20) -> str:
  """Hashes sizes, beginnings and ends: 11 GB need not be read to know them."""
  total = hashlib.sha256()
  for name in _files(path):
    size = name.stat().st_size
    with name.open("rb") as file:
      total.update(f"{name.name} {size}\0".encode() + file.read(part))
      file.seek(max(0, size - part))
      total.update(file.read(part))
  return total.hexdigest()


_TINY = (
  models.WanConfig(
    layers=2,
    width=24,
    heads=2,
    ffn_width=32,
    freq_width=16,
    text_width=8,
    text_length=4,
  ),
  dataclasses.replace(
    models.WAN_VAE, width=4, multipliers=(1, 1, 1, 1), blocks=1
  ),
)

RANDOM = {
  "1.3B": (
    models.WAN_1_3B,
    dataclasses.replace(models.WAN_VAE, dtype=jnp.bfloat16),
  ),
  "tiny": _TINY,
}
"""Sizes of random networks: configs of transformer and autoencoder."""


def random_networks(size: str, *, seed: int = 0) -> Networks:
  """Draws networks, to measure speed: their videos show nothing.

  Args:
    size: one of `RANDOM`.
    seed: of the parameters.

  Raises:
    ValueError: if there is no such size.
  """
  if size not in RANDOM:
    raise ValueError(f"`size` must be one of {list(RANDOM)}; got {size!r}.")
  config, vae_config = RANDOM[size]
  model, vae = models.Wan(config), models.Vae(vae_config)
  x = jnp.zeros((1, *config.patch, config.in_channels))
  text = jnp.zeros((1, config.text_length, config.text_width))
  shapes = jax.eval_shape(
    lambda key: (
      model.init(key, x, jnp.zeros((1, 1)), text)["params"],
      vae.init(key, jnp.zeros((1, 5, 16, 16, 3)))["params"],
    ),
    jax.random.key(0),
  )
  params, vae_params = random_params(
    shapes, jax.random.key(seed), dtype=config.dtype
  )

  def embed(prompts: Sequence[str]) -> Float[np.ndarray, "b l d"]:
    draw = lambda p: np.random.default_rng(list(p.encode())).standard_normal(
      text.shape[1:], np.float32
    )
    return np.stack([draw(prompt) for prompt in prompts])

  return Networks(
    transformer=model,
    params=params,
    vae=vae,
    vae_params=vae_params,
    embed=embed,
    about={},
    weights_hash=f"random {size}, seed {seed}",
  )


def random_params(shapes: Params, key: Array, *, dtype: Any) -> Params:
  """Draws parameters on the device, by their shapes, in one short program.

  Args:
    shapes: of a network's `init`; scales are 1, kernels normal and such that
      features keep their size, all else is normal and small.
    key: of the draws.
    dtype: of the parameters.
  """
  leaves, tree = jax.tree.flatten_with_path(shapes)
  sizes = [math.prod(leaf.shape) for _, leaf in leaves]
  starts = np.cumsum([0, *sizes])
  blocks = -(-int(starts[-1]) // _BLOCK)

  def draw(key: Array) -> Params:
    # A loop, and not a generator for each parameter: those compile slowly.
    block = lambda key: jax.random.normal(key, (_BLOCK,), dtype)
    numbers = jax.lax.map(block, jax.random.split(key, blocks)).ravel()
    return tree.unflatten(
      jnp.ones(leaf.shape, dtype)
      if path[-1].key == "scale"
      else _std(leaf.shape) * numbers[start : start + size].reshape(leaf.shape)
      for (path, leaf), start, size in zip(
        leaves, starts[:-1], sizes, strict=True
      )
    )

  return jax.jit(draw)(key)


def _std(shape: tuple[int, ...]) -> float:
  """Returns 1 / sqrt(inputs) for a kernel, of layers or of a convolution."""
  if len(shape) < 2:
    return 0.02
  inputs = math.prod(shape[:-1]) if len(shape) == 5 else shape[-2]
  return inputs**-0.5
