"""What a traced function runs: primitives, counted without dead code."""

import collections
import functools
import re

import jax
from jax.interpreters import partial_eval as pe


def count(traced) -> collections.Counter:
  """Counts each primitive's runs; a scan's body counts once an iteration.

  Args:
    traced: `jax.jit(f).trace(*args)`.
  """
  return _count(_live(traced), 1, collections.Counter())


def attention(traced) -> dict[str, int]:
  """Counts the attention passes, such as {"fwd": 2, "bwd": 2}."""
  return {
    name.removeprefix("attention_"): n
    for name, n in count(traced).items()
    if name.startswith("attention_")
  }


def _live(traced):
  """The traced program without its dead code."""
  jaxpr = getattr(traced.jaxpr, "jaxpr", traced.jaxpr)
  return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _count(jaxpr, times, counts):
  for eqn in jaxpr.eqns:
    counts[eqn.primitive.name] += times
    for sub in _inner(eqn):
      _count(sub, times * eqn.params.get("length", 1), counts)
  return counts


def _inner(eqn):
  """The programs inside of an equation."""
  for value in eqn.params.values():
    for sub in value if isinstance(value, (tuple, list)) else (value,):
      sub = getattr(sub, "jaxpr", sub)
      if hasattr(sub, "eqns"):
        yield sub


def lowered(traced, platform: str) -> collections.Counter:
  """Counts the kernels of attention in the program lowered for a platform.

  A scan's body counts once.
  """
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return collections.Counter(
    re.findall(r'kernel_name = "attention_(\w+)"', text)
  )


def compiled(program) -> set[str]:
  """Names of the attention kernels that a program compiled for TPUs calls."""
  call = r'%attention_([a-z]+)[.\w]* = .* custom_call_target="tpu_custom_call"'
  return set(re.findall(call, program.as_text()))


def products(traced) -> dict[str, list[int]]:
  """Returns the matrix products in the body of each Pallas kernel, by name.

  A scan's body counts once. Kernel bodies hold everything twice, for whole
  tiles and for boundary tiles; half of that is returned.
  """
  found = collections.defaultdict(list)
  for eqn in _equations(_live(traced)):
    if eqn.primitive.name.startswith("attention_"):
      run = functools.partial(eqn.primitive.impl, **eqn.params)
      for inner in _equations(jax.make_jaxpr(run)(*map(_shape, eqn.invars))):
        if inner.primitive.name == "pallas_call":
          dots = _count(inner.params["jaxpr"], 1, collections.Counter())
          assert dots["dot_general"] % 2 == 0
          name = inner.params["name"].removeprefix("attention_")
          found[name].append(dots["dot_general"] // 2)
  return {name: sorted(numbers) for name, numbers in found.items()}


def _shape(variable):
  return jax.ShapeDtypeStruct(variable.aval.shape, variable.aval.dtype)


def _equations(jaxpr):
  """All equations, those inside of others too."""
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    yield eqn
    for sub in _inner(eqn):
      yield from _equations(sub)
