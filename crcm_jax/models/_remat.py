"""What a layer keeps for its backward pass, by name.

Under `jax.checkpoint` a layer keeps its input and recomputes the rest. A
policy names what it keeps besides:

* `"full"`: nothing; the whole layer is recomputed.
* `"attention"`: output and log-sum-exp of the attention operations, so that
  the part which is quadratic in tokens does not run twice.
* `"dots"`: the products with weights as well.
"""

import jax

from crcm_jax import kernels

REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": kernels.save_attention,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    kernels.save_attention,
  ),
}
"""Policies for `WanConfig.remat`."""
