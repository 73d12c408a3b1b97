"""The sizes that a mesh asks for, checked before anything is compiled."""

import math
from collections.abc import Mapping
from typing import Any

from crcm_jax.training._config import did_you_mean
from crcm_jax.training._rules import AXES, BATCH


def fill(sizes: Mapping[str, int | None], devices: int) -> dict[str, int]:
  """Returns the devices along each axis; one None takes those left over.

  Args:
    sizes: devices along each axis.
    devices: devices to use, in all.

  Raises:
    ValueError: if the axes do not multiply to them.
  """
  given = {axis: n for axis, n in sizes.items() if n is not None}
  for axis, n in given.items():
    if not isinstance(n, int) or n < 1:
      raise ValueError(f"`mesh.{axis}` must be at least 1 device; got {n!r}.")
  used = math.prod(given.values())
  rest = devices // used
  filled = {axis: rest if n is None else n for axis, n in sizes.items()}
  if math.prod(filled.values()) != devices or not rest:
    product = " x ".join(f"{axis} {n}" for axis, n in given.items())
    raise ValueError(
      f"`mesh` must multiply to the number of devices, {devices}; got {product}"
      f" = {used}. Change one of {', '.join(AXES)}, set `mesh.data` to None to"
      " take the devices that the others leave, or `mesh.devices` to use fewer."
    )
  return filled


def check_axes(sizes: Mapping[str, int | None]) -> None:
  """Raises ValueError if a mesh has other keys than `make_mesh` takes."""
  known = (*AXES, "devices")
  for axis in sizes:
    if axis not in known:
      raise ValueError(
        f"`mesh.{axis}` is no axis{did_you_mean(axis, known)}; a mesh takes"
        f" {[*known]}."
      )


def splits_batch(mesh: Mapping[str, int], batch: int) -> bool:
  """Whether examples divide by the devices that they are split over."""
  return batch % math.prod(mesh[axis] for axis in BATCH) == 0


def check_batch(
  mesh: Mapping[str, int], batch: int, micro_batches: int = 1
) -> None:
  """Raises ValueError if examples do not divide by data x fsdp.

  Those of each micro-batch must too: every device would compute all of one
  that does not.
  """
  data, fsdp = (mesh[axis] for axis in BATCH)
  if batch % micro_batches:
    raise ValueError(
      f"`loop.micro_batches` must divide `data.batch_size`, {batch}; got"
      f" {micro_batches}. Choose one of its divisors, or another batch."
    )
  if not splits_batch(mesh, batch):
    raise ValueError(
      f"`data.batch_size` must divide by the devices of `mesh.data` x"
      f" `mesh.fsdp`, {data} x {fsdp} = {data * fsdp}; got {batch}. Change the"
      " batch, or give devices to `mesh.context` or `mesh.tensor` instead."
    )
  each = batch // micro_batches
  if not splits_batch(mesh, each):
    most = batch // (data * fsdp)
    raise ValueError(
      "`loop.micro_batches` must leave each micro-batch examples that divide by"
      f" the devices of `mesh.data` x `mesh.fsdp`, {data} x {fsdp} ="
      f" {data * fsdp}; got {micro_batches}, of {each} examples each. Set it to"
      f" {most} or a divisor of that, make `data.batch_size` (now {batch})"
      " larger, or give devices to `mesh.context` or `mesh.tensor` instead."
    )


def check_heads(mesh: Mapping[str, int], heads: int) -> None:
  """Raises ValueError if heads do not divide by tensor."""
  if heads % mesh["tensor"]:
    raise ValueError(
      f"`mesh.tensor` must divide the {heads} heads of the network; got"
      f" {mesh['tensor']}. Give the devices to `mesh.fsdp` or `mesh.context`,"
      " which split any number of heads."
    )


def check_tokens(mesh: Mapping[str, int], tokens: int) -> None:
  """Raises ValueError if the tokens of a frame do not divide by context."""
  n = mesh["context"]
  if tokens % n:
    fits = max(m for m in range(1, n) if tokens % m == 0)
    raise ValueError(
      f"`mesh.context` must divide the {tokens} tokens of a latent frame, of"
      f" which each device holds an equal part; got {n}. {fits} divides them;"
      " give the other devices to `mesh.fsdp`."
    )


def check_stage(
  mesh: Mapping[str, int], config: Any, shape: Any, micro_batches: int = 1
) -> None:
  """Checks a network and the latents `[b f h w c]` that it is trained on.

  Args:
    mesh: devices along each axis.
    config: of the network.
    shape: of the latents of a whole batch.
    micro_batches: parts that a step takes one after another.

  Raises:
    ValueError: if they do not divide by the devices they are split over.
  """
  check_batch(mesh, shape[0], micro_batches)
  check_heads(mesh, config.heads)
  check_tokens(mesh, config.tokens_per_frame(*shape[2:4]))
