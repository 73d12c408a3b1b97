"""Floating-point operations of a function, counted in its jaxpr.

Counted are matrix products, convolutions and attention, two operations for a
multiplication and its addition; what is done element by element is not. The
body of a scan counts once an iteration, which XLA's `cost_analysis` does not
do, and code whose result nobody uses counts nothing.

Attention counts the products that the visible (query, key) pairs of its mask
need, whatever a kernel computes beside them. For each pair of a query and a
key, and each of their heads, a product is `2 * head width` operations:

    forward    s, p v                                           2
    fused      and tq k, q tk, p tv, (p ts) v                   up to 6
    linear     s again, and those of the tangent                up to 5
    backward   s again, p^T do, do v^T, ds k, ds^T q            up to 5

and zero tangents and unwanted cotangents need none.

*Necessary* operations of a train step, the numerator of model FLOP
utilisation, are those of the step without rematerialisation, and without the
"s again" of attention: `step`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from crcm_jax import sampling
from crcm_jax.kernels._compat import pe
from crcm_jax.kernels.backend import spread
from crcm_jax.training._stages import Phase, read_stage, Stage


class Flops(NamedTuple):
  """Floating-point operations.

  Attributes:
    matmul: of matrix products and convolutions.
    attention: of attention, over visible pairs.
  """

  matmul: float = 0.0
  attention: float = 0.0

  @property
  def total(self) -> float:
    """Both together."""
    return self.matmul + self.attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunTime:
  """What a program says at run time only, and has to be assumed.

  Attributes:
    trips: iterations of a loop whose number is not known.
    context: share of a cache that attention finds filled.
  """

  trips: float = 1.0
  context: float = 1.0


def count(
  function: Callable[..., Any], *args: Any, run_time: RunTime | None = None
) -> Flops:
  """Counts the operations of `function(*args)`, on all devices together.

  Args:
    function: what to trace; it may be jitted, and use derivatives, scans,
      `jax.checkpoint` (whose recomputation counts) and `shard_map`. Of the
      branches of a `cond` the largest counts.
    *args: arrays or their shapes.
    run_time: what is known at run time only; by default such loops run once
      and caches are full.

  Example:
    >>> import jax.numpy as jnp
    >>> a = jnp.ones((3, 4))
    >>> count(lambda a: a @ a.T, a)
    Flops(matmul=72.0, attention=0.0)
  """
  return _of_jaxpr(_live(function, *args), run_time or RunTime(), _operations)


def moved(
  function: Callable[..., Any], *args: Any, run_time: RunTime | None = None
) -> float:
  """Counts the bytes that products and attention read and write.

  Every operation reads its operands and writes its results once, and what is
  done element by element hides in them: no program moves much less.

  Args:
    function: what to trace, as for `count`.
    *args: arrays or their shapes.
    run_time: as for `count`.

  Returns:
    Bytes, on all devices together.
  """
  live = _live(function, *args)
  return _of_jaxpr(live, run_time or RunTime(), _bytes).total


def step(stage: Stage, phase: Phase = "student") -> Flops:
  """Counts the necessary operations of a train step of a whole batch.

  They are those of the step without anything that is computed a second time
  for a derivative. A rollout's number of steps varies from iteration to
  iteration: it counts on average over them.

  Args:
    stage: the stage; its batch is that of all devices.
    phase: which of its steps.
  """
  plain = without_remat(stage)
  state = plain.state_shapes()
  live = _live(
    plain.train_steps()[phase],
    state,
    plain.frozen_shapes(),
    plain.dataset.shapes(),
    jax.eval_shape(plain.run_key),
  )
  once = functools.partial(_operations, again=False)
  return _of_jaxpr(live, run_time_of(plain), once)


def without_remat(stage: Stage) -> Stage:
  """Returns the stage whose networks save what the backward pass needs."""
  config = dict(stage.config)
  config.pop("stage")
  config["network"] = config["network"] | {"remat": None}
  if "networks" in config:
    config["networks"] = {
      role: network | {"remat": None}
      for role, network in config["networks"].items()
    }
  return read_stage(stage.name, config, stage.stages)


def run_time_of(stage: Stage) -> RunTime:
  """Returns the mean length of a stage's rollouts, and how full its cache is.

  Every chunk of b takes `n_b = min(G, m_b)` steps, all but the last in a loop,
  G going around 1 ... m_0 (`step_counts`); and all of them, and the pass that
  commits the chunk, see the frames before it.
  """
  if stage.pattern is None or not stage.kind.few_step:
    return RunTime()
  frames = stage.dataset.shapes().x_0.shape[1]
  spans = np.array(stage.pattern.spans(frames))
  mids = stage.sampling.mid_times[str(stage.sampling.most_steps)]
  schedules = [(1.0, *mid_times, 0.0) for mid_times in mids]
  _, full = sampling.chunk_times(schedules, len(spans))
  full = np.asarray(full)
  cycle = np.arange(1, full[0] + 1)[:, None]
  steps = np.minimum(cycle, full).mean(axis=0)
  queries = (steps + 1) * (spans[:, 1] - spans[:, 0])
  seen = float(queries @ spans[:, 0] / queries.sum() / frames)
  return RunTime(trips=float(steps.mean()) - 1, context=seen)


def _live(function: Callable[..., Any], *args: Any) -> Any:
  """The traced function without its dead code."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def _of_jaxpr(jaxpr: Any, run_time: RunTime, measure: Any) -> Flops:
  parts = [_of_equation(eqn, run_time, measure) for eqn in jaxpr.eqns]
  return _sum(parts)


def _of_equation(eqn: Any, run_time: RunTime, measure: Any) -> Flops:
  name = eqn.primitive.name
  if name in _PRODUCTS or name in _ATTENTION:
    return measure(eqn, run_time)
  parts = [_of_jaxpr(jaxpr, run_time, measure) for jaxpr in _inner(eqn)]
  if name == "cond":
    return max(parts, key=lambda part: part.total)
  times = _times(eqn, run_time)
  return Flops(*(times * part for part in _sum(parts)))


def _operations(eqn: Any, run_time: RunTime, again: bool = True) -> Flops:
  name = eqn.primitive.name
  if name in _PRODUCTS:
    return Flops(matmul=float(_PRODUCTS[name](eqn)))
  return Flops(attention=float(_attention(eqn, run_time.context, again)))


def _bytes(eqn: Any, run_time: RunTime) -> Flops:
  del run_time  # A cache counts as if it were full.
  arrays = [v.aval for v in (*eqn.invars, *eqn.outvars)]
  total = float(sum(a.size * a.dtype.itemsize for a in arrays))
  if eqn.primitive.name in _PRODUCTS:
    return Flops(matmul=total)
  return Flops(attention=total)


def _sum(parts: list[Flops]) -> Flops:
  return Flops(*map(sum, zip(*parts, strict=True))) if parts else Flops()


def _inner(eqn: Any) -> list[Any]:
  """The programs inside of an equation."""
  found = []
  for value in eqn.params.values():
    for inner in value if isinstance(value, tuple | list) else (value,):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        found.append(inner)
  return found


def _times(eqn: Any, run_time: RunTime) -> int | float:
  """How often all devices together run the programs inside of an equation."""
  match eqn.primitive.name:
    case "scan":
      return eqn.params["length"]
    case "while":
      known = _trips(eqn)
      return run_time.trips if known is None else known
    case "shard_map":
      name = next(n for n in eqn.params if n.endswith("manual_axes"))
      mesh = eqn.params["mesh"].shape
      return math.prod(mesh[axis] for axis in eqn.params[name])
    case "pallas_call":
      return math.prod(eqn.params["grid_mapping"].grid)
  return 1


def _trips(eqn: Any) -> int | None:
  """Iterations of `while i < stop: ...; i += 1` between literals, or None."""
  condition = eqn.params["cond_jaxpr"].jaxpr
  body = eqn.params["body_jaxpr"].jaxpr
  consts, body_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
  if [e.primitive.name for e in condition.eqns] != ["lt"]:
    return None
  counter, stop = condition.eqns[0].invars
  if counter not in condition.invars[consts:]:
    return None
  index = condition.invars.index(counter) - consts
  start = eqn.invars[consts + body_consts + index]
  if stop in condition.invars[:consts]:
    stop = eqn.invars[condition.invars.index(stop)]
  makers = [e for e in body.eqns if body.outvars[index] in e.outvars]
  if [e.primitive.name for e in makers] != ["add"]:
    return None
  before, by = makers[0].invars
  literals = [x.val for x in (start, stop, by) if hasattr(x, "val")]
  if before is not body.invars[body_consts + index] or len(literals) < 3:
    return None
  first, last, step = map(float, literals)
  return max(0, math.ceil((last - first) / step))


def _dot_general(eqn: Any) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return (
    2
    * math.prod(eqn.outvars[0].aval.shape)
    * math.prod(left[axis] for axis in contracted)
  )


def _convolution(eqn: Any) -> int:
  """Counts the products with elements of the input, not with its padding."""
  numbers = eqn.params["dimension_numbers"]
  left, right = (v.aval.shape for v in eqn.invars)
  out = eqn.outvars[0].aval.shape
  batch, features, *spatial = numbers.out_spec
  pairs = 1
  for i, axis in enumerate(spatial):
    at = np.arange(out[axis])[:, None] * eqn.params["window_strides"][i]
    tap = np.arange(right[numbers.rhs_spec[2 + i]])
    at = at + tap * eqn.params["rhs_dilation"][i] - eqn.params["padding"][i][0]
    spread_by = eqn.params["lhs_dilation"][i]
    size = left[numbers.lhs_spec[2 + i]]
    inside = (at >= 0) & (at <= (size - 1) * spread_by)
    pairs *= int(np.sum(inside & (at % spread_by == 0)))
  return 2 * out[batch] * out[features] * right[numbers.rhs_spec[1]] * pairs


_PRODUCTS = {
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
}


def _attention(eqn: Any, context: float, again: bool) -> float:
  """Counts visible pairs times products; `again` with recomputed scores."""
  problem = eqn.params["problem"]
  floats = eqn.invars[: problem.num_floats]
  b, *_, n, d = floats[0].aval.shape
  products = _ATTENTION[eqn.primitive.name](problem, eqn.params, again)
  pairs = _visible(problem, floats, context)
  return 2 * b * n * d * float(np.dot(pairs, products))


def _visible(problem: Any, floats: Any, context: float) -> list[Any]:
  """Visible (query, key) pairs in each of the arrays of keys."""
  # Tokens may have several axes, frames and patches.
  tokens = [math.prod(x.aval.shape[1:-2]) for x in floats]
  queries, lengths = tokens[0], tokens[1::2]
  pairs = problem.mask.visible_pairs(lengths[problem.ranged :])
  return [context * queries * lengths[0], *pairs] if problem.ranged else pairs


def _tangent(problem: Any, nonzero: Any) -> list[int]:
  """Products of the output's tangent alone, for each array of keys."""
  q, *rest = spread([True] * sum(nonzero), nonzero)
  products = []
  for k, v in zip(rest[::2], rest[1::2], strict=True):
    scores = bool(q) + bool(k)
    products.append(scores + bool(scores) + bool(v))
  assert len(products) == problem.pairs
  return products


_Params: TypeAlias = Mapping[str, Any]


def _forward(problem: Any, params: _Params, again: bool) -> list[int]:
  del params, again
  return [2] * problem.pairs


def _fused(problem: Any, params: _Params, again: bool) -> list[int]:
  del again
  return [2 + n for n in _tangent(problem, params["nonzero"])]


def _linear(problem: Any, params: _Params, again: bool) -> list[int]:
  tangents = _tangent(problem, params["nonzero"])
  return [(again and n > 0) + n for n in tangents]


def _backward(problem: Any, params: _Params, again: bool) -> list[int]:
  del problem
  q, *rest = params["wanted"]
  products = []
  for k, v in zip(rest[::2], rest[1::2], strict=True):
    scores = again and (q or k or v)
    products.append(bool(scores) + bool(q or k) + q + k + v)
  return products


_ATTENTION = {
  "attention_fwd": _forward,
  "attention_fused": _fused,
  "attention_lin": _linear,
  "attention_bwd": _backward,
}
