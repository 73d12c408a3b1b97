"""A tiny network on `[b, f, c]` and every loss as one function of it."""

import jax
import jax.numpy as jnp

from crcm_jax import losses

PARAMS = {"w": jnp.array([[[0.7, -0.4]]]), "b": jnp.array(0.3)}
B, F, C = 2, 3, 2


def velocity(params, x, t):
  """A frame-wise network: frames and examples do not mix."""
  return jnp.tanh(params["w"] * x) + params["b"] * t[..., None]


def teacher(x, t):
  return jnp.sin(x) * (1 - t[..., None])


def fake(x, t):
  """The fake score, another than the teacher."""
  return jnp.cos(x) + 0 * t[..., None]


def mean_velocity(params, x, t, end_time):
  return velocity(params, x, t) * (1 + end_time[..., None])


def batch():
  """Returns data, noise and times per frame."""
  keys = jax.random.split(jax.random.key(0), 3)
  x_0, noise = (jax.random.normal(key, (B, F, C)) for key in keys[:2])
  return x_0, noise, jax.random.uniform(keys[2], (B, F), minval=0.3, maxval=0.9)


def _times(t, steps=2):
  return jnp.stack([t * (1 - 0.1 * k) for k in range(steps + 1)], axis=-1)


def _distribution_matching(
  v, params, frozen, x_0, noise, t, fake=fake, **settings
):
  sample = x_0 - t[..., None] * v(params, x_0, t)
  return losses.distribution_matching_loss(
    sample, noise, t, frozen, fake, **settings
  )


def _no_teacher(loss):
  return lambda v, params, frozen, *args, **settings: loss(
    v, params, *args, **settings
  )


def _stepping(loss):
  return lambda v, params, frozen, x_0, noise, t, **settings: loss(
    v, params, frozen, x_0, noise, _times(t), **settings
  )


def _mean_flow(v, params, frozen, x_0, noise, t, **settings):
  return losses.mean_flow_loss(
    lambda p, x, time, end: v(p, x, time) * (1 + end[..., None]),
    params,
    frozen,
    x_0,
    noise,
    t,
    t / 2,
    **settings,
  )


LOSSES = {
  "flow_matching": _no_teacher(losses.flow_matching_loss),
  "critic": _no_teacher(losses.critic_loss),
  "regression": _no_teacher(losses.regression_loss),
  "discrete": _stepping(losses.discrete_consistency_loss),
  "trigflow_discrete": _stepping(losses.trigflow_discrete_consistency_loss),
  "continuous": losses.continuous_consistency_loss,
  "mean_flow": _mean_flow,
  "trigflow_continuous": losses.trigflow_continuous_consistency_loss,
  "distribution_matching": _distribution_matching,
}
"""`loss(velocity, params, teacher, x_0, noise, t, **settings)`."""

WITH_TEACHER = [
  name
  for name in LOSSES
  if name not in ("flow_matching", "critic", "regression")
]
