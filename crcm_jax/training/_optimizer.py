"""The optimizer of every stage: AdamW with a short linear warm-up."""

from typing import Any

import jax.numpy as jnp
import optax


def adamw(
  learning_rate: float,
  *,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
  weight_decay: float = 0.01,
  warmup_steps: int = 100,
  warmup_start: float = 1e-6,
  clip_norm: float | None = None,
  decay_mask=None,
) -> optax.GradientTransformation:
  """Returns AdamW whose learning rate rises linearly, then stays.

  At its own update k the learning rate is `learning_rate` times
  `warmup_start + (1 - warmup_start) k / warmup_steps` until k reaches
  `warmup_steps`, then times 1. An update that was skipped does not count.

  Args:
    learning_rate: the rate after warm-up.
    b1: decay of the first moment; distillation stages use 0, which keeps none.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled decay, of all parameters unless `decay_mask`.
    warmup_steps: length of the warm-up in updates; 0 for none.
    warmup_start: the first update's fraction of the rate.
    clip_norm: clips the gradients' global norm; None does not.
    decay_mask: a tree (or function to one) of booleans, what to decay.
  """
  schedule = warmed_up(
    learning_rate, warmup_steps=warmup_steps, warmup_start=warmup_start
  )
  clip = () if clip_norm is None else (optax.clip_by_global_norm(clip_norm),)
  return optax.chain(
    *clip,
    _scale_by_moments(b1, b2, eps),
    optax.add_decayed_weights(weight_decay, decay_mask),
    optax.scale_by_learning_rate(schedule),
  )


def _scale_by_moments(
  b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
  """Returns Adam; without a first moment, it keeps none in memory."""
  if b1:
    return optax.scale_by_adam(b1, b2, eps)
  return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)


def warmed_up(
  learning_rate: float,
  *,
  warmup_steps: int = 100,
  warmup_start: float = 1e-6,
  **other: Any,
) -> optax.Schedule:
  """Returns the learning rate of each of `adamw`'s updates.

  Args:
    learning_rate: the rate after warm-up.
    warmup_steps: length of the warm-up in updates; 0 for none.
    warmup_start: the first update's fraction of the rate.
    **other: further settings of `adamw`, which do not matter here.
  """
  del other

  def schedule(updates):
    # optax.linear_schedule loses the first update's 1e-6 in float32.
    updates = jnp.asarray(updates, jnp.result_type(float))
    done = updates / max(warmup_steps, 1)
    done = jnp.minimum(done, 1) if warmup_steps else jnp.ones_like(done)
    return learning_rate * (warmup_start + (1 - warmup_start) * done)

  return schedule
