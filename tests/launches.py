"""What a traced function runs: primitives, counted without dead code."""

import collections

from jax.interpreters import partial_eval as pe


def count(traced) -> collections.Counter:
  """Counts each primitive's runs; a scan's body counts once an iteration.

  Args:
    traced: `jax.jit(f).trace(*args)`.
  """
  jaxpr = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)
  live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(live, 1, collections.Counter())


def attention(traced) -> dict[str, int]:
  """Counts the attention passes, such as {"fwd": 2, "bwd": 2}."""
  return {
    name.removeprefix("attention_"): n
    for name, n in count(traced).items()
    if name.startswith("attention_")
  }


def _count(jaxpr, times, counts):
  for eqn in jaxpr.eqns:
    counts[eqn.primitive.name] += times
    inner = times * eqn.params.get("length", 1)
    for value in eqn.params.values():
      for sub in value if isinstance(value, (tuple, list)) else (value,):
        sub = getattr(sub, "jaxpr", sub)
        if hasattr(sub, "eqns"):
          _count(sub, inner, counts)
  return counts
