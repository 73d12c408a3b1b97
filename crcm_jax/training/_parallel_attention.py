"""Attention over a mesh: each device has some examples, heads and tokens.

XLA cannot split the kernels of `kernels.attention`, so `shard_map` does, even
where only examples are split:

    examples over data and fsdp,   heads over tensor,   tokens over context.

The tokens of a video have two axes, `[b f p n d]`, and context splits p: each
device has the same part of every frame. A mask's rows are whole frames, so all
devices see equally many keys, whatever the mask. Tokens of one axis (of a
prompt) are not split.

Of n devices along context, each needs all keys of the heads that it computes.
With h heads on them, and g = gcd(h, n):

    all-to-all among g neighbours      [f, p / n, h] -> [f, p g / n, h / g]
    all-gather of keys and values among the n / g groups  -> [f, p, h / g]
    attention of p g / n queries of each frame, and the all-to-all back.

The queries of a prompt's keys stay where they are. All of it is linear around
attention, so tangents and gradients travel the same way.

A rollout's many short passes wait for each exchange. There every device keeps
the whole cache, gathers the keys and values of the new chunk (g = 1), and has
nothing else to send; `lean` splits the cache, and swaps as above.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from crcm_jax import kernels, models
from crcm_jax._typing import Array, Float, Int
from crcm_jax.training._mesh_checks import (
  check_heads,
  check_tokens,
  splits_batch,
)
from crcm_jax.training._placement import Placement
from crcm_jax.training._rules import AnyMesh, BATCH

_PATCHES, _HEADS = 2, 3  # axes of [b f p n d]


@dataclasses.dataclass(frozen=True)
class ParallelAttention:
  """`kernels.attention` over a mesh, with the same signature.

  Attributes:
    mesh: devices, as of `sharding.make_mesh`.
    attention: what each device computes.
    lean: whether a cache is split over context.

  Example:
    >>> import jax.numpy as jnp
    >>> from crcm_jax.training import sharding
    >>> attend = sharding.ParallelAttention(sharding.make_mesh())
    >>> q = k = v = jnp.ones((1, 3, 4, 2, 8))
    >>> attend(q, k, v).shape
    (1, 3, 4, 2, 8)
  """

  mesh: AnyMesh
  attention: Callable[..., Array] = kernels.attention
  lean: bool = False

  def __call__(
    self,
    q: Float[Array, "b *s n d"],
    k: Float[Array, "b *z n d"] | None,
    v: Float[Array, "b *z n d"] | None,
    *,
    context: tuple[Float[Array, "b *y n d"], Float[Array, "b *y n d"]]
    | None = None,
    context_ranges: Int[Array, "r 2"] | None = None,
    mask: kernels.BlockMask | None = None,
    **settings: Any,
  ) -> Float[Array, "b *s n d"]:
    """Attends as `kernels.attention` does.

    Args:
      q: queries, `[b f p n d]`; those of one token axis are not split.
      k: keys, `[b f p n d]`, or of one token axis, whole on every device.
      v: values.
      context: keys and values of a history, likewise.
      context_ranges: as there.
      mask: as there, with rows of whole frames.
      **settings: passed on.

    Raises:
      ValueError: if heads or tokens do not divide by their devices, or a row
        of the mask ends inside a frame.
    """
    own = None if k is None else (k, v)
    exchange = self._exchange(q, own, context)
    mask = self._rows_of_a_device(mask, q, exchange)

    def local(q, own, context, ranges):
      q, own = exchange.heads(q), exchange.keys(own)
      k, v = own or (None, None)
      context = exchange.keys(context)
      o = self.attention(
        q, k, v, context=context, context_ranges=ranges, mask=mask, **settings
      )
      return exchange.tokens(o)

    spec = functools.partial(self._spec, batch=q.shape[0])
    specs = (
      spec(q),
      jax.tree.map(spec, own),
      jax.tree.map(spec, context),
      None if context_ranges is None else PartitionSpec(),
    )
    run = jax.shard_map(
      local, mesh=self.mesh, in_specs=specs, out_specs=spec(q)
    )
    return run(q, own, context, context_ranges)

  def with_cache(
    self,
    q: Float[Array, "b f p n d"],
    k: Float[Array, "b f p n d"],
    v: Float[Array, "b f p n d"],
    *,
    past: models.KeysValues,
    of_layer: models.KeysValues,
    layer: Int[Array, ""],
    ranges: Int[Array, "r 2"],
  ) -> Float[Array, "b f p n d"]:
    """Attends as `models.attend_with_cache` does."""
    exchange = self._exchange(q, (k, v), None)
    if not self.lean:
      exchange = _Exchange(exchange.devices, 1)
    lies = not self.lean or exchange.groups == 1  # as it is read

    def local(q, own, past, of_layer, layer, ranges):
      q, (k, v) = exchange.heads(q), exchange.keys(own)
      if lies:
        o = models.attend_with_cache(
          self.attention,
          *(q, k, v),
          past=past,
          of_layer=of_layer,
          layer=layer,
          ranges=ranges,
        )
      else:
        context = exchange.keys(of_layer)
        o = self.attention(q, k, v, context=context, context_ranges=ranges)
      return exchange.tokens(o)

    own, everywhere = self._spec(q, q.shape[0]), PartitionSpec()
    of_cache = Placement.for_heads(self.mesh, q.shape[-2], lean=self.lean).spec(
      "cache/past/keys", past.keys
    )
    run = jax.shard_map(
      local,
      mesh=self.mesh,
      in_specs=(
        *(own, own),
        *(of_cache, PartitionSpec(*of_cache[1:])),
        *(everywhere, everywhere),
      ),
      out_specs=own,
    )
    return run(q, (k, v), past, of_layer, layer, ranges)

  def _exchange(self, q: Array, own: Any, context: Any) -> "_Exchange":
    """Returns how the keys come to the devices that need them."""
    size = self.mesh.shape
    check_heads(size, q.shape[-2])
    for x in jax.tree.leaves((q, own, context)):
      if x.ndim > 4:
        check_tokens(size, x.shape[_PATCHES])
    split = {x.ndim > 4 for x in jax.tree.leaves((own, context))}
    if len(split) > 1 or (True in split and q.ndim == 4):
      raise ValueError(
        "`q`, `k` and `context` must all have the token axes [f p], or the keys"
        f" one token axis; got {q.shape} and"
        f" {[x.shape for x in jax.tree.leaves((own, context))]}."
      )
    n = size["context"] if True in split else 1
    return _Exchange(n, math.gcd(n, q.shape[-2] // size["tensor"]))

  def _rows_of_a_device(
    self, mask: kernels.BlockMask | None, q: Array, exchange: "_Exchange"
  ) -> kernels.BlockMask | None:
    """Returns the mask of the queries that a device holds: of each frame."""
    whole = self.mesh.shape["context"]
    parts = exchange.groups if exchange.devices > 1 else whole
    if mask is None or parts == 1 or q.ndim == 4:
      return mask
    tokens = q.shape[_PATCHES]
    if any(end % tokens for row in mask.rows for end in row.queries):
      raise ValueError(
        f"`mask` must have rows of whole frames, of {tokens} tokens, to be"
        f" split over the {whole} devices of `mesh.context`; got the rows"
        f" {[row.queries for row in mask.rows]}. Or set `mesh.context=1`."
      )
    return mask.shard_rows(parts)[0]  # They are all the same.

  def _spec(self, x: Array, batch: int) -> PartitionSpec:
    examples = BATCH if splits_batch(self.mesh.shape, batch) else None
    tokens = (None,) if x.ndim == 4 else (None, "context")
    return PartitionSpec(examples, *tokens, "tensor")


@dataclasses.dataclass(frozen=True)
class _Exchange:
  """Moves tokens and heads between the devices along context.

  Attributes:
    devices: n; 1 if nothing moves.
    neighbours: g, consecutive devices that swap tokens for heads.
  """

  devices: int
  neighbours: int

  @property
  def groups(self) -> int:
    """How many groups of neighbours compute the same heads."""
    return self.devices // self.neighbours

  def heads(self, x: Array) -> Array:
    """All-to-all, [b f p/n h d] to [b f pg/n h/g d]."""
    return self._swap(x, _HEADS, _PATCHES)

  def tokens(self, x: Array) -> Array:
    """All-to-all, [b f pg/n h/g d] to [b f p/n h d]."""
    return self._swap(x, _PATCHES, _HEADS)

  def keys(self, pair: tuple[Array, Array] | None) -> Any:
    """All tokens of the device's heads, [b f p/n h d] to [b f p h/g d]."""
    return jax.tree.map(lambda x: self._gather(self.heads(x)), pair)

  def _swap(self, x: Array, split: int, join: int) -> Array:
    if self.neighbours == 1:
      return x
    return jax.lax.all_to_all(
      x, "context", split, join, axis_index_groups=self._groups(), tiled=True
    )

  def _gather(self, x: Array) -> Array:
    if self.groups == 1:
      return x
    return jax.lax.all_gather(
      x,
      "context",
      axis=_PATCHES,
      axis_index_groups=self._groups(across=True),
      tiled=True,
    )

  def _groups(self, across: bool = False) -> list[list[int]] | None:
    """Devices that are neighbours, or that compute the same heads."""
    if self.groups == 1 or self.neighbours == 1:
      return None
    groups = np.arange(self.devices).reshape(-1, self.neighbours)
    return (groups.T if across else groups).tolist()
