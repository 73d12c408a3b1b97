"""Tar shards of latents, as Causal-rCM publishes its training data.

A record KEY has three members, which may lie anywhere in its shard:

  KEY.latent.pt    one tensor [c, f, h, w], normalised latents
  KEY.embed.pt     one tensor [l, d], text embeddings
  KEY.prompt.txt   the caption, UTF-8

Nothing is unpacked to disk, and no code in a pickle is run.
"""

import io
import math
import os
import pathlib
import tarfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from crcm_jax.data._records import BadRecord, LatentExample, Records

_PARTS = ("latent.pt", "embed.pt", "prompt.txt")


def read_latent_shards(
  paths: Iterable[str | os.PathLike[str]], *, channels: int = 16
) -> Records:
  """Reads the records of tar shards, whole and broken ones.

  Args:
    paths: the shards.
    channels: of a latent; another number is a sign of another layout.

  Returns:
    An iterator over `LatentExample` and `BadRecord`, shard by shard. Keys
    begin with the shard's name, for shards may count from zero each.

  Raises:
    FileNotFoundError: if there is no such shard.
  """
  for path in map(pathlib.Path, paths):
    try:
      with tarfile.open(path) as tar:
        yield from _read_shard(tar, path, channels)
    except tarfile.TarError as error:
      yield BadRecord(path.name, f"is no tar file ({error})")


def read_embedding(path: str | os.PathLike[str]) -> Float[np.ndarray, "l d"]:
  """Reads the embeddings of one prompt.

  Args:
    path: a `.npy`, or a `.pt` with one tensor.

  Returns:
    The embeddings, float32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it holds something else.
  """
  path = pathlib.Path(path)
  if path.suffix != ".npy":
    return _tensor(path.read_bytes(), str(path), 2)
  array = np.load(path)  # ValueError, if it is none
  if array.ndim != 2:
    raise ValueError(f"{path} must have 2 axes; it has {array.shape}.")
  return array.astype(np.float32)


def _read_shard(
  tar: tarfile.TarFile, path: pathlib.Path, channels: int
) -> Records:
  groups, problem = _group_members(tar)
  for key, members in groups.items():
    yield _read_record(tar, f"{path.stem}/{key}", members, channels)
  if problem is not None:
    yield BadRecord(path.name, f"is cut off ({problem}); copy it again")


def _group_members(
  tar: tarfile.TarFile,
) -> tuple[dict[str, dict[str, tarfile.TarInfo]], tarfile.TarError | None]:
  """Returns each record's members, as far as the archive can be read."""
  groups: dict[str, dict[str, tarfile.TarInfo]] = {}
  try:
    for member in tar:
      for part in _PARTS:
        if member.isfile() and member.name.endswith(f".{part}"):
          key = member.name.removeprefix("./").removesuffix(f".{part}")
          groups.setdefault(key, {})[part] = member
  except tarfile.TarError as error:
    return groups, error
  return groups, None


def _read_record(
  tar: tarfile.TarFile,
  key: str,
  members: dict[str, tarfile.TarInfo],
  channels: int,
) -> LatentExample | BadRecord:
  if missing := [part for part in _PARTS if part not in members]:
    return BadRecord(key, f"has no {' and no '.join(missing)}")
  try:
    raw = {part: _read_member(tar, member) for part, member in members.items()}
    latents = _tensor(raw["latent.pt"], members["latent.pt"].name, 4)
    embedding = _tensor(raw["embed.pt"], members["embed.pt"].name, 2)
    caption = raw["prompt.txt"].decode()
  except Exception as error:  # a broken archive can raise anything
    return BadRecord(key, f"cannot be read: {error}")
  if len(latents) != channels:
    return BadRecord(
      key,
      f"must have latents [c, f, h, w] with c = {channels}; it has"
      f" {latents.shape}",
    )
  return LatentExample(key, np.moveaxis(latents, 0, -1), embedding, caption)


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
  stream: Any = tar.extractfile(member)
  raw = stream.read()
  if len(raw) != member.size:
    raise ValueError(f"{member.name} is cut off")
  return raw


def _tensor(raw: bytes, name: str, rank: int) -> np.ndarray:
  """Returns the only tensor of a torch file, without batch axes of one."""
  # Here, because it brings Flax, which moving digits do without.
  from crcm_jax.models._torch_file import open_torch

  tensors = open_torch(name, io.BytesIO(raw))
  if len(tensors) != 1:
    raise ValueError(f"{name} must hold one tensor; it holds {len(tensors)}")
  (tensor,) = tensors.values()
  extra = len(tensor.shape) - rank
  if extra < 0 or any(size != 1 for size in tensor.shape[:extra]):
    raise ValueError(f"{name} must have {rank} axes; it has {tensor.shape}")
  if math.prod(tensor.shape) * tensor.dtype.itemsize > len(raw):
    raise ValueError(f"{name} must hold the numbers of {tensor.shape}")
  # NumPy has no bfloat16 that every routine knows.
  return tensor.read().astype(np.float32).reshape(tensor.shape[extra:])
