"""A batch made ready for networks and losses: bad data, dropped captions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax import losses, paths
from crcm_jax._times import wide_dtype
from crcm_jax._typing import Array, Bool, Float, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training._counters import Counters


class Inputs(NamedTuple):
  """A batch whose non-finite examples can harm nobody but themselves.

  Attributes:
    x_0: data for the loss; all NaN in a bad example, which losses drop.
    history: data for the network to condition on; zero in a bad example.
    condition: captions; zero in a bad example.
    null_condition: what stands for no caption, one per example.
  """

  x_0: Float[Array, "b f h w c"]
  history: Float[Array, "b f h w c"]
  condition: Any
  null_condition: Any


def prepare(batch: Any, drop: Bool[Array, "b"] | None = None) -> Inputs:
  """Returns a batch's arrays as an objective needs them.

  Args:
    batch: `x_0`, `condition` and `null_condition`, as in `data.Batch`.
    drop: examples that get the null condition; None drops no caption.
  """
  null = jax.tree.map(
    lambda n, c: jnp.broadcast_to(n, c.shape),
    batch.null_condition,
    batch.condition,
  )
  condition = batch.condition
  if drop is not None:
    condition = jax.tree.map(
      lambda n, c: jnp.where(_along(drop, c), n, c), null, condition
    )
  finite = losses.finite_examples((batch.x_0, condition, null))
  history, condition, null = losses.zero_examples(
    (jnp.asarray(batch.x_0), condition, null), finite
  )
  marked = jnp.where(_along(finite, history), history, jnp.nan)
  return Inputs(marked, history, condition, null)


def noise_like(key: PRNGKeyArray, x: Array, *lead: int) -> Array:
  """Draws standard normal noise of a shape, in at least float32."""
  return jax.random.normal(key, (*lead, *x.shape), wide_dtype(x.dtype))


def per_frame(t: Float[Array, "b"], x: Array) -> Float[Array, "b f"]:
  """Gives every frame of an example its one time."""
  return jnp.repeat(t[:, None], x.shape[1], axis=1)


def noisy_history(
  history: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"] | None,
  context_times: tuple[float, ...],
  pattern: ChunkPattern,
) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f"] | None]:
  """Returns the context of teacher forcing and its times (None: clean).

  A student whose cache holds noisy chunks (`rollout(context="last_step")`)
  trains on contexts as noisy: (1 - tau_b) x_0 + tau_b noise in chunk b.

  Args:
    history: clean data.
    noise: standard normal draws; None with a clean context.
    context_times: tau of each chunk; the last one serves all further chunks.
    pattern: how frames form chunks.
  """
  if noise is None:
    return history, None
  frames = history.shape[1]
  chunk = jnp.minimum(pattern.chunk_of_frame(frames), len(context_times) - 1)
  tau = jnp.asarray(context_times, noise.dtype)[chunk]
  tau = jnp.broadcast_to(tau, history.shape[:2])
  return paths.interpolate(history, noise, tau), tau


def context_noise(
  key: PRNGKeyArray, x_0: Array, context_times: tuple[float, ...]
) -> Array | None:
  """Draws the noise of `noisy_history`; None where the context is clean."""
  return noise_like(key, x_0) if any(context_times) else None


def warmed_up(warmup: int, counters: Counters, like: Array) -> Array:
  """Returns min(1, iteration / warmup) in the dtype of `like`; 0 is no warm-up.

  Args:
    warmup: iterations over which the weight rises from 0 to 1.
    counters: where the training is.
    like: gives the dtype.
  """
  if warmup == 0:
    return jnp.ones((), like.dtype)
  return jnp.minimum(counters.iteration.astype(like.dtype) / warmup, 1)


def _along(flags: Bool[Array, "b"], x: Array) -> Array:
  return flags.reshape(flags.shape + (1,) * (x.ndim - 1))
