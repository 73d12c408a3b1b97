"""Layers that are stacked, or lie apart.

Parameters of all layers are stacked along a first axis, which a scan takes
apart: one layer is compiled, whatever their number. But on a GPU each layer's
part is copied before it is used, in each pass anew. In a pass over a few tokens
these copies, and waiting for them, take nearly as long as the products. Layers
that lie apart are not scanned, and their queries, keys and values are one
product.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from crcm_jax._typing import Params

_NAME = "layer_{}"
_OF_ONE_INPUT = ("query", "key", "value")
JOINED = "_".join(_OF_ONE_INPUT)
"""Name of their one product: `kernel [in 3 out]`, `bias [3 out]`."""


def unstack_layers(params: Params) -> Params:
  """Returns a network's parameters with the layers apart.

  `Wan` computes the same with them, one layer after another in the program,
  which takes longer to compile. Outside a loop over passes, this is one copy
  for all of them. A gradient keeps what all layers computed, whatever
  `WanConfig.remat`. Checkpoints hold stacked layers; these are for computing.

  Args:
    params: of a `Wan`.

  Example:
    >>> import jax.numpy as jnp
    >>> params = {"blocks": {"ffn": {"bias": jnp.zeros((2, 8))}}}
    >>> jax.tree.map(jnp.shape, unstack_layers(params))["blocks"]
    {'layer_0': {'ffn': {'bias': (8,)}}, 'layer_1': {'ffn': {'bias': (8,)}}}
  """
  blocks = params["blocks"]
  layers = len(jax.tree.leaves(blocks)[0])
  take = lambda i: _joined(of_layer(blocks, i))
  return {**params, "blocks": {_NAME.format(i): take(i) for i in range(layers)}}


def _joined(block: Params) -> Params:
  """Returns a layer whose self-attention has one product for its input."""
  if "self_attention" not in block:
    return block
  attention = dict(block["self_attention"])
  three = [attention.pop(name) for name in _OF_ONE_INPUT]
  join = lambda *a: jnp.stack(a, axis=-2)
  return {
    **block,
    "self_attention": {**attention, JOINED: jax.tree.map(join, *three)},
  }


def layers_apart(blocks: Mapping[str, Any]) -> list[Params] | None:
  """Returns each layer's parameters; None if they are stacked."""
  if _NAME.format(0) not in blocks:
    return None
  return [blocks[_NAME.format(i)] for i in range(len(blocks))]


def of_layer(tree: Any, i: int) -> Any:
  """Returns a layer's part of what is stacked, or a list of each layer's."""
  return jax.tree.map(lambda a: a[i], tree, is_leaf=_is_list)


def stacked(tree: Any) -> Any:
  """Returns a tree with each list of what the layers have stacked."""

  def stack(part: Any) -> Any:
    if not _is_list(part):
      return part
    return jax.tree.map(lambda *layers: jnp.stack(layers), *part)

  return jax.tree.map(stack, tree, is_leaf=_is_list)


def _is_list(tree: Any) -> bool:
  return isinstance(tree, list)
