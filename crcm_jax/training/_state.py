"""All that a training run must remember, besides its data position."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from crcm_jax._times import wide_dtype
from crcm_jax._typing import Array, Int, Params

Count: TypeAlias = Any
"""int32, shape []. Not annotated as an array: JAX also builds this class with
shapes or shardings for leaves, which the run-time checks would refuse."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """One state for both phases; a stage without a critic has `fake=None`.

  Attributes:
    step: iterations done, of either phase; also seeds each step's draws.
    student: the trained network's parameters.
    student_opt_state: its optimizer's state.
    student_updates: updates applied to it (its learning rate's clock).
    ema: moving average of `student`, at least float32: what is evaluated.
    fake: the critic's (fake score's) parameters, or None.
    fake_opt_state: its optimizer's state, or None.
    fake_updates: updates applied to it.
    skipped: updates not applied because something was not finite.
  """

  step: Count
  student: Params
  student_opt_state: optax.OptState
  student_updates: Count
  ema: Params
  fake: Params | None
  fake_opt_state: Any
  fake_updates: Count
  skipped: Count


def init_state(
  student: Params,
  optimizer: optax.GradientTransformation,
  *,
  fake: Params | None = None,
  fake_optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
  """Returns the state before the first iteration.

  Every leaf is a new buffer: the train step donates the state, which must not
  delete the arrays it was started from (a teacher's, for `fake`).

  Args:
    student: initial parameters of the trained network.
    optimizer: its optimizer.
    fake: initial parameters of the critic: the bidirectional teacher's.
    fake_optimizer: the critic's optimizer.

  Raises:
    ValueError: if only one of `fake` and `fake_optimizer` is given.
  """
  if (fake is None) != (fake_optimizer is None):
    raise ValueError(
      "`fake` and `fake_optimizer` belong together; got only `"
      f"{'fake_optimizer' if fake is None else 'fake'}`. Pass both for a "
      "stage with a critic, neither for one without."
    )
  student, fake = _copy(student), _copy(fake)
  fake_opt_state = None
  if fake is not None and fake_optimizer is not None:
    fake_opt_state = fake_optimizer.init(fake)
  return TrainState(
    step=_zero(),
    student=student,
    student_opt_state=optimizer.init(student),
    student_updates=_zero(),
    ema=jax.tree.map(_at_least_float32, student),
    fake=fake,
    fake_opt_state=fake_opt_state,
    fake_updates=_zero(),
    skipped=_zero(),
  )


def _zero() -> Int[Array, ""]:
  return jnp.array(0, jnp.int32)


def _copy(params: Params) -> Params:
  return jax.tree.map(lambda p: jnp.array(p, copy=True), params)


def _at_least_float32(p: Array) -> Array:
  return jnp.array(p, wide_dtype(p.dtype), copy=True)
