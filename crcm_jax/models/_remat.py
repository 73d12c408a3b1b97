"""What a layer keeps for its backward pass, by name.

Under `jax.checkpoint` a layer keeps its input and recomputes the rest. A
policy names what it keeps besides:

* `"full"`: nothing; the whole layer is recomputed.
* `"attention"`: output and log-sum-exp of the attention operations, so that
  the part which is quadratic in tokens does not run twice.
* `"outputs"`: the output of the feed-forward layers as well, which the gradient
  of their gate needs: of all products, the most work for its size.
* `"dots"`: what attention computed, and all products with weights.
"""

from typing import Any

import jax

from crcm_jax import kernels

FEED_FORWARD = "feed_forward"
"""Name of the output of a feed-forward layer."""

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": kernels.save_attention,
  "outputs": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(FEED_FORWARD),
    kernels.save_attention,
  ),
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    kernels.save_attention,
  ),
}
"""Policies for `WanConfig.remat`."""


def remat_policy(name: str | None, *, placed: bool) -> Any:
  """Returns what to keep of a layer; None where it keeps all.

  Args:
    name: of `WanConfig.remat`.
    placed: whether the layer's parameters are gathered from other devices as
      it begins. To keep them would be to hold all layers' at once, so without
      a name everything but them is kept.
  """
  if name is None:
    return _all_but_placed if placed else None
  return REMAT_POLICIES[name]


def _all_but_placed(prim: Any, *_: Any, **__: Any) -> bool:
  return prim.name != "sharding_constraint"
