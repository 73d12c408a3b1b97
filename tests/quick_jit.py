"""`jax.jit` for tests: a third of the compile time, slower programs."""

import functools

import jax

_jit = jax.jit  # A test may put `quick_jit` in its place.
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
      _jit(lambda: 0, compiler_options={name: value})()
      known[name] = value
    except Exception:  # Unknown to this version: whatever it raises.
      continue
  return known


def quick_jit(function, compiler_options=None, **settings):
  """Returns a jitted function whose compilation takes few optimisations."""
  options = _options() | (compiler_options or {})
  return _jit(function, compiler_options=options, **settings)
