"""A chunk model small enough to follow by hand: v knows the past's sum."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

PARAMS = {
  "w": jnp.array(0.3),
  "h": jnp.array(0.1),
  "caption": jnp.array(0.2),
}


class Past(NamedTuple):
  """The conditioning, and committed frames with their times."""

  caption: jnp.ndarray
  x: jnp.ndarray
  t: jnp.ndarray
  frames: jnp.ndarray


class ToyChunks:
  """v = w x + h (weighted sum of the past's frames) + caption + frame * t."""

  def __init__(self, shape=(2, 2, 1), dtype=jnp.float32):
    self.shape, self.dtype = shape, dtype
    self.calls = 0  # Number of traces of the network.

  def init(self, params, batch, frames):
    return Past(
      params["caption"],
      jnp.zeros((batch, frames, *self.shape), self.dtype),
      jnp.zeros((batch, frames), self.dtype),
      jnp.array(0, jnp.int32),
    )

  def velocity(self, params, x, t, cache):
    self.calls += 1
    weight = (1 + cache.t)[..., None, None, None]
    seen = jnp.arange(cache.t.shape[1]) < cache.frames
    seen = seen[None, :, None, None, None].astype(x.dtype)
    past = jnp.sum(seen * weight * cache.x, axis=1, keepdims=True)
    place = (cache.frames + jnp.arange(t.shape[1])).astype(t.dtype)
    place = (place[None] * t)[..., None, None, None]
    return params["w"] * x + params["h"] * past + cache.caption + place

  def append(self, params, x, t, cache):
    v = self.velocity(params, x, t, cache)
    x, t = lax.stop_gradient((x, t))
    zero = jnp.array(0, jnp.int32)
    start = (zero, cache.frames, zero, zero, zero)
    past = Past(
      cache.caption,
      lax.dynamic_update_slice(cache.x, x, start),
      lax.dynamic_update_slice(cache.t, t, (zero, cache.frames)),
      cache.frames + x.shape[1],
    )
    return lax.stop_gradient(v), past

  def rewind(self, params, cache, frames):
    return cache._replace(frames=frames, caption=params["caption"])


def _velocity(x, t, past, position):
  """The toy's velocity in NumPy; `past` is a list of (frame chunk, time)."""
  seen = sum((1 + t_past) * np.sum(c, 1, keepdims=True) for c, t_past in past)
  place = np.arange(position, position + x.shape[1])[None, :, None, None, None]
  w, h, caption = (float(PARAMS[n]) for n in ("w", "h", "caption"))
  return w * x + h * seen + caption + place * t


def by_hand(noise, spans, times, counts, **settings):
  """The rollout's equations in NumPy, one chunk after the other."""
  get = settings.get
  prefix, xi = get("prefix"), get("context_noise")
  given = 0 if prefix is None else prefix.shape[1]
  past, parts, row = [], [], 0
  for b, (start, stop) in enumerate(spans):
    full = int((times[row] > 0).sum())
    tau, count = times[row][full - 1], int(counts[row])
    if start < given:
      x_0 = last = prefix[:, start:stop]
      t, count = 0.0, 0
    else:
      frames = slice(start - given, stop - given)
      x = get("initial_scale", 1.0) * noise[0][:, frames]
      for s in range(count):
        t, last = times[row][s], x
        t_next = times[row][s + 1]
        v = _velocity(x, t, past, start)
        x_0 = x - t * v
        if get("solver") == "euler":
          x = x - (t - t_next) * v
        elif s + 1 < count:
          x = (1 - t_next) * x_0 + t_next * noise[s + 1][:, frames]
      row += 1
    context, context_t = x_0, 0.0
    if get("context") == "last_step" and b >= get("context_start", 0):
      context, context_t = last, t
      if count < full:
        context = (1 - tau) * x_0 + tau * xi[:, start:stop]
        context_t = tau
    past.append((context, context_t))
    at = lambda t, x=x_0: np.full(x.shape[:2], t)
    parts.append((x_0, last, at(t), context, at(context_t)))
  return [np.concatenate(p, 1) for p in zip(*parts, strict=True)]
