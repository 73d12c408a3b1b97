"""One training iteration, as a pure jitted function of the state.

The student's and the critic's iterations are two functions over one state;
the loop asks `Alternation.is_student(iteration)` which is due. Both derive
their randomness from (run key, state.step), so a resumed run repeats nothing
and stores no key.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from crcm_jax import models
from crcm_jax._typing import Array, Bool, Params
from crcm_jax.kernels._compat import target_platform
from crcm_jax.training import _accumulate
from crcm_jax.training._counters import Alternation, Counters
from crcm_jax.training._ema import ema_beta, ema_exponent, ema_update
from crcm_jax.training._state import TrainState
from crcm_jax.training.objectives._objective import Masked, Objective


class Mean(NamedTuple):
  """A metric as a sum and a weight: there is none where the weight is 0."""

  total: Any
  weight: Any


Metrics: TypeAlias = dict[str, Any]
"""Scalars by name, and the `Mean`s of those that a step may lack."""

TrainStep: TypeAlias = Callable[
  [TrainState, dict[str, Params], Any, Array], tuple[TrainState, Metrics]
]


class Shardings(NamedTuple):
  """Where the arguments of a train step live; None leaves it to JAX.

  Attributes:
    state: a `TrainState` of shardings; the new state keeps them.
    frozen: shardings of the frozen parameters.
    batch: shardings of a batch.
  """

  state: Any = None
  frozen: Any = None
  batch: Any = None


def make_train_step(
  objective: Objective,
  optimizer: optax.GradientTransformation,
  *,
  phase: Literal["student", "critic"] = "student",
  alternation: Alternation | None = None,
  ema_rate: float = 0.1,
  micro_batches: int = 1,
  copy_dtype: Any = None,
  learning_rate: optax.Schedule | None = None,
  shardings: Shardings | None = None,
) -> TrainStep:
  """Returns the jitted iteration of one phase.

  The loss is the mean of the objective's per-example losses. If it or its
  gradient is not finite, the iteration changes neither parameters, moments,
  nor moving average: it only counts itself in `state.skipped`.

  Args:
    objective: the stage's loss; for the critic's phase, `Critic`.
    optimizer: that of the network which this phase trains.
    phase: which network this phase trains, `state.student` or `state.fake`.
      The other one joins the objective's frozen parameters by that name.
    alternation: the run's order of phases, for the counters.
    ema_rate: relative width of the student's moving average.
    micro_batches: parts of a batch, whose gradients are added up: the step of
      the whole batch in the memory of one part.
    copy_dtype: dtype of the copy of their linear layers that networks read
      (`models.working_copy`); the state keeps the masters. None for no copy;
      or one for each role ("student", "fake", "teacher", "real"), those left
      out having none.
    learning_rate: the optimizer's schedule, to be shown among the metrics.
    shardings: where state, frozen parameters and batch live.

  Returns:
    `step(state, frozen, batch, key) -> (state, metrics)`. The state is
    donated. `frozen` maps names ("teacher", "real") to parameters; `key` is
    the run's key, the same at every step. Metrics are float scalars, and
    `Mean`s of those that a step may lack: `read_scalars` makes numbers of both.

  Raises:
    ValueError: for an unknown phase.
  """
  if phase not in ("student", "critic"):
    raise ValueError(f'`phase` must be "student" or "critic"; got {phase!r}.')
  alternation = alternation or Alternation()
  exponent = ema_exponent(ema_rate)
  trains = {"student": "student", "critic": "fake"}[phase]
  advance = {"student": _advance_student, "critic": _advance_critic}[phase]

  def step(state, frozen, batch, key):
    counters = alternation.counters(state.step)
    step_key = jax.random.fold_in(key, state.step)
    draw = lambda batch: objective.draws(step_key, batch, counters)
    trained, opt_state, frozen = _roles(phase, state, frozen)
    read = {
      role: as_read(params, _of_role(copy_dtype, role))
      for role, params in frozen.items()
    }
    (loss, metrics), grads = _accumulate.gradient(
      lambda params, batch, draws: objective.loss(
        params, read, batch, draws, counters
      ),
      as_read(trained, _of_role(copy_dtype, trains)),
      batch,
      draw(batch),
      draw=draw,
      micro_batches=micro_batches,
    )
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, new_opt_state = optimizer.update(grads, opt_state, trained)
    new = optax.apply_updates(trained, updates)
    scalars = {"loss": loss, "grad_norm": grad_norm, **_scalars(metrics)}
    if learning_rate is not None:
      scalars["learning_rate"] = learning_rate(_updates(phase, state))
    if phase == "student":
      scalars["ema_decay"], _ = ema_beta(counters.student, exponent)
    state = advance(state, new, new_opt_state, finite, counters, exponent)
    return state, scalars | {"skipped": state.skipped.astype(loss.dtype)}

  s = shardings or Shardings()
  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(s.state, s.frozen, s.batch, None),
    out_shardings=(s.state, None),
    compiler_options=_GPU_OPTIONS if target_platform() == "gpu" else None,
  )


_GPU_OPTIONS = {
  # All products are cuBLAS's: Triton's take longer, and so does tuning them.
  "xla_gpu_enable_triton_gemm": False,
  # With Triton off XLA copies what it multiplies to lengths that 8 divides.
  # Only columns need that, and a Wan's have it; its tokens are rows.
  "xla_disable_hlo_passes": "cublas-pad-for-gemms",
}


def _of_role(copy_dtype: Any, role: str) -> Any:
  is_each = isinstance(copy_dtype, Mapping)
  return copy_dtype.get(role) if is_each else copy_dtype


def as_read(params: Params, dtype: Any) -> Params:
  """Returns what a network reads: a working copy, or with None the masters."""
  return params if dtype is None else models.working_copy(params, dtype)


def _roles(
  phase: str, state: TrainState, frozen: dict[str, Params]
) -> tuple[Params, optax.OptState, dict[str, Params]]:
  """Returns (trained parameters, optimizer state, everything frozen)."""
  if phase == "student":
    frozen = frozen if state.fake is None else frozen | {"fake": state.fake}
    return state.student, state.student_opt_state, frozen
  frozen = frozen | {"student": state.student}
  return state.fake, state.fake_opt_state, frozen


def _updates(phase: str, state: TrainState) -> Array:
  """Returns the updates applied so far to the network that is trained."""
  return state.student_updates if phase == "student" else state.fake_updates


def _advance_student(
  state: TrainState,
  student: Params,
  opt_state: optax.OptState,
  finite: Bool[Array, ""],
  counters: Counters,
  exponent: float,
) -> TrainState:
  ema = ema_update(state.ema, student, counters.student, exponent)
  return dataclasses.replace(
    state,
    step=state.step + 1,
    student=_where(finite, student, state.student),
    student_opt_state=_where(finite, opt_state, state.student_opt_state),
    student_updates=state.student_updates + finite,
    ema=_where(finite, ema, state.ema),
    skipped=state.skipped + ~finite,
  )


def _advance_critic(
  state: TrainState,
  fake: Params,
  opt_state: optax.OptState,
  finite: Bool[Array, ""],
  counters: Counters,
  exponent: float,
) -> TrainState:
  del counters, exponent  # The critic has no moving average.
  return dataclasses.replace(
    state,
    step=state.step + 1,
    fake=_where(finite, fake, state.fake),
    fake_opt_state=_where(finite, opt_state, state.fake_opt_state),
    fake_updates=state.fake_updates + finite,
    skipped=state.skipped + ~finite,
  )


def _where(finite: Bool[Array, ""], new: Any, old: Any) -> Any:
  return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def _scalars(metrics: Any) -> Metrics:
  """Returns metrics as named numbers: means of floats, sums of counts.

  A field of one number per example and part becomes one number per part,
  `name/0`, `name/1`, ...
  """
  scalars = {}
  leaves = jax.tree.leaves_with_path(
    metrics, is_leaf=lambda x: isinstance(x, Masked)
  )
  for path, value in leaves:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if isinstance(value, Masked):
      scalars |= _means(name, value)
      continue
    count = jnp.issubdtype(value.dtype, jnp.integer)
    over = jnp.sum if count else jnp.mean
    value = over(value, axis=0) if value.ndim else value
    if value.ndim:
      scalars |= {f"{name}/{i}": part for i, part in enumerate(value)}
    else:
      scalars[name] = value
  return scalars


def _means(name: str, masked: Masked) -> dict[str, Mean]:
  sums = (jnp.sum(array, axis=0) for array in masked)
  parts = enumerate(zip(*sums, strict=True))
  return {f"{name}/{i}": Mean(*part) for i, part in parts}


def read_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns a step's metrics as numbers, without those that it lacks."""
  values = {}
  for name, value in jax.device_get(metrics).items():
    if not isinstance(value, Mean):
      values[name] = float(value)
    elif value.weight > 0:
      values[name] = float(value.total / value.weight)
  return values
