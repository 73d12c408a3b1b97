"""Layers that are stacked, or lie apart.

Parameters of all layers are stacked along a first axis, which a scan takes
apart: one layer is compiled, whatever their number. But on a GPU each layer's
part is copied before it is used, in each pass anew. In a pass over a few tokens
these copies, and waiting for them, take nearly as long as the products. Layers
that lie apart are not scanned.
"""

from collections.abc import Mapping
from typing import Any

import jax

from crcm_jax._typing import Params

_NAME = "layer_{}"


def unstack_layers(params: Params) -> Params:
  """Returns a network's parameters with the layers apart.

  `Wan` computes the same with them, one layer after another in the program,
  which takes longer to compile. Outside a loop over passes, this is one copy
  for all of them. A gradient keeps what all layers computed, whatever
  `WanConfig.remat`.

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
  take = lambda i: jax.tree.map(lambda a: a[i], blocks)
  return {**params, "blocks": {_NAME.format(i): take(i) for i in range(layers)}}


def layers_apart(blocks: Mapping[str, Any]) -> list[Params] | None:
  """Returns each layer's parameters; None if they are stacked."""
  if _NAME.format(0) not in blocks:
    return None
  return [blocks[_NAME.format(i)] for i in range(len(blocks))]
