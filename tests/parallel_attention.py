"""Attention over eight devices and on one: a program of `eight_devices`.

`python parallel_attention.py MESH...` prints, for each mesh and case, how far
value, tangent and gradients are from those of `kernels.attention`.
"""

import functools
import sys

import eight_devices
import jax
import jax.numpy as jnp

from crcm_jax import kernels, models
from crcm_jax.kernels import BlockMask
from crcm_jax.training import sharding

B, F, P, N, D, L = 8, 3, 8, 12, 4, 5
ENDS = (0, P, 3 * P)  # chunks of one frame and of two

CASES = {
  # own keys, context, mask, keyword arguments
  "full": ("own", None, None),
  "block_causal": ("own", None, BlockMask.block_causal(ENDS)),
  "window": ("own", None, BlockMask.block_causal(ENDS, window=1, sink=1)),
  "noisy_rows": ("own", "past", BlockMask.noisy_rows(ENDS)),
  "query_chunk": (
    "own",
    "past",
    BlockMask.block_causal((0, F * P, 2 * F * P), query_chunk=1),
  ),
  "packed": ("packed", None, BlockMask.teacher_forcing(ENDS)),
  "ranges": ("own", "cache", None),
  "layers": ("own", "layers", None),
  "layers_lean": ("own", "layers", None),
  "cache_alone": (None, "cache", None),
  "prompt": ("prompt", None, None),
}


def operands(case):
  """Draws queries, own keys and values, and context."""
  own, context, _ = CASES[case]
  keys = iter(jax.random.split(jax.random.key(len(case)), 9))
  draw = lambda *tokens: jax.random.normal(next(keys), (B, *tokens, N, D))
  sizes = dict(own=(F, P), past=(F, P), cache=(5, P), prompt=(L,))
  sizes["packed"] = (2 * F, P)
  pair = lambda name: name and (draw(*sizes[name]), draw(*sizes[name]))
  q = draw(*sizes["packed" if own == "packed" else "own"])
  if context == "layers":  # a cache of three
    layers = [pair("cache") for _ in range(3)]
    return q, pair(own), jax.tree.map(lambda *a: jnp.stack(a), *layers)
  return q, pair(own), pair(context)


def derivatives(attention, case):
  """Returns value, tangent along everything, and all gradients."""
  _, context, mask = CASES[case]
  ranges = jnp.array([[0, P], [2 * P, 3 * P + 3]], jnp.int32)

  with_cache = functools.partial(
    getattr(
      attention,
      "with_cache",
      functools.partial(models.attend_with_cache, attention),
    ),
    layer=jnp.int32(1),
    ranges=ranges,
  )

  def attend(q, own, context):
    k, v = own or (None, None)
    if CASES[case][1] == "layers":
      past = models.KeysValues(*context)
      of_layer = jax.tree.map(lambda a: a[1], past)
      return with_cache(q, k, v, past=past, of_layer=of_layer)
    more = dict(context_ranges=ranges) if CASES[case][1] == "cache" else {}
    return attention(q, k, v, context=context, mask=mask, **more)

  def all_three(x, t):
    value, tangent = jax.jvp(attend, x, t)
    return value, tangent, jax.vjp(attend, *x)[1](tangent)

  del context
  x = operands(case)
  t = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), x)
  return jax.jit(all_three)(x, t)


def main(*meshes):
  """Compares every case on every mesh."""
  eight_devices.start()
  jax.config.update("jax_disable_most_optimizations", True)
  for case in CASES:
    want = derivatives(kernels.attention, case)
    for text in meshes:
      attention = sharding.ParallelAttention(
        eight_devices.mesh(text), lean=case.endswith("lean")
      )
      got = derivatives(attention, case)
      far = jax.tree.map(
        lambda a, b: float(abs(jax.device_get(a) - jax.device_get(b)).max()),
        got,
        want,
      )
      eight_devices.say(case=case, mesh=text, far=max(jax.tree.leaves(far)))


if __name__ == "__main__":
  main(*sys.argv[1:])
