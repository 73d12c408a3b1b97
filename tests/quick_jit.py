"""`jax.jit` for tests: a third of the compile time, slower programs."""

import functools

import jax

_OPTIONS = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def _options():
  """Returns the options this version of JAX knows."""
  known = {}
  for name, value in _OPTIONS.items():
    try:
      jax.jit(lambda: 0, compiler_options={name: value})()
      known[name] = value
    except Exception:  # Unknown to this version: whatever it raises.
      continue
  return known


def quick_jit(function):
  """Returns a jitted function whose compilation takes few optimisations."""
  return jax.jit(function, compiler_options=_options())
