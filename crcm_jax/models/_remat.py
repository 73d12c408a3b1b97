"""What a layer keeps for its backward pass, by name.

Under `jax.checkpoint` a layer keeps its input and recomputes the rest. A
policy names what it keeps besides:

* `"full"`: nothing.
* `"attention"`: the outputs of the attention kernels, so that the costliest
  and quadratic part is not run twice.
* `"dots"`: the outputs of all matrix products with weights, and of attention.
"""

from typing import Any

import jax

# Policies see primitives, and attention is one of ours: a name given to its
# output would not save the log-sum-exp that its backward pass reads.
_ATTENTION = "crcm_attention"


def _save_attention(primitive: Any, *_: Any, **__: Any) -> bool:
  return primitive.name.startswith(_ATTENTION)


def _save_dots(primitive: Any, *args: Any, **params: Any) -> bool:
  weights = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return bool(weights(primitive, *args, **params) or _save_attention(primitive))


REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": _save_attention,
  "dots": _save_dots,
}
