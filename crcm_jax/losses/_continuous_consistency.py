"""Consistency in continuous time: the tangent of the student along the ODE.

A consistency function is constant along the teacher's ODE dx/dt = v_T. For
the rectified-flow data prediction f = x - t v this says

    g = -(v - v_T) - t dv/dt = 0,    dv/dt = JVP(v; (x_t, t), (v_T, 1)),

and the losses move v by the normalised g, gradient stopped:

    loss = || v - sg(v) - g / (||g|| + c) ||^2,   gradient -2 g/(||g|| + c) dv.

One `jax.jvp` gives v, whose gradient is kept, and dv/dt, whose gradient is
stopped (`tangent_pass="shared"`); networks without such derivatives have
"separate" and "finite_difference". MeanFlow is the two-time form, TrigFlow the
form in the angle.

References:
  Lu and Song, https://arxiv.org/abs/2410.11081 (sCM)
  Zheng et al., rCM, https://arxiv.org/abs/2510.08431
  Geng et al., Mean Flows, https://arxiv.org/abs/2505.13447
  Causal-rCM, https://arxiv.org/abs/2606.25473, equations (2)-(4), (15)-(18)
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import _times, paths
from crcm_jax._times import expand, wide
from crcm_jax._typing import (
  Array,
  Bool,
  Float,
  Int,
  ParametricVelocity,
  Params,
  Velocity,
)
from crcm_jax.losses import _examples, _tangents


class ContinuousConsistencyMetrics(NamedTuple):
  """What a continuous-time consistency loss measures, per example.

  Attributes:
    tangent_norm: norm of the student's tangent dv/dt along the ODE.
    teacher_gap: norm of the student's velocity minus the teacher's.
    normaliser: `||g|| + c`; `||g||` is the quantity that falls in training,
      the loss itself stays near 1.
    dropped: 1 where data, teacher or tangent removed the example.
    student_non_finite: 1 where the student itself gave NaN or infinity.
  """

  tangent_norm: Float[Array, "b"]
  teacher_gap: Float[Array, "b"]
  normaliser: Float[Array, "b"]
  dropped: Int[Array, "b"]
  student_non_finite: Int[Array, "b"]


TangentPass = Literal["shared", "separate", "finite_difference"]
"""How the tangent is computed; see `continuous_consistency_loss`."""

TANGENT_STEP = 1e-4
"""Default step of "finite_difference", in units of time."""


def continuous_consistency_loss(
  velocity: ParametricVelocity,
  params: Params,
  teacher: Velocity,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  *,
  tangent_weight: float | Float[Array, ""] = 1.0,
  normaliser_eps: float = 0.1,
  tangent_pass: TangentPass = "shared",
  tangent_step: float = TANGENT_STEP,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], ContinuousConsistencyMetrics]:
  """Drives the student to be constant along the teacher's ODE (sCM).

      g = -(sg(v) - v_T) - tangent_weight * t * dv/dt
      loss = sum of (v - sg(v) - g / (||g|| + normaliser_eps))^2

  The gradient flows through v alone; its value is near 1 unless g vanishes,
  which it does at the teacher's exact consistency function.

  Args:
    velocity: the student, `velocity(params, x_t, t)`; differentiated forward
      in `(x_t, t)` and backward in `params`.
    params: the parameters to differentiate.
    teacher: frozen velocity function whose ODE is followed, guidance included.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    tangent_weight: weight of the tangent term, warmed up from 0 to 1 in
      training; may be a run-time scalar.
    normaliser_eps: the constant c beside the norm of g.
    tangent_pass: "shared" takes v and its tangent from one pass; "separate"
      runs the tangent apart on stopped parameters, for networks whose
      attention allows no gradient through a jvp; "finite_difference" takes
      two more forward passes instead of a jvp, for networks whose attention
      has no forward mode (a `jax.custom_vjp`).
    tangent_step: h of "finite_difference", the central difference
      `(v(x_t + h v_T, t + h) - v(x_t - h v_T, t - h)) / 2h`. It is biased by
      `h^2 / 6` times the third derivative along the ODE, so of second order,
      and asks for v at times up to h outside [0, 1]. Wan's features turn by
      1000 t: the bias is then up to (1000 h)^2 / 6 of their derivative, 0.2 %
      at the default step. Rounding adds about `eps |v| / h`: little in
      float32, several percent of the tangent of a bfloat16 network.
    frame_weight: weight of each frame; one with 0 is removed from g, and has
      no tangent.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, a concrete time is out of range, or
      `tangent_pass` is unknown.

  Example:
    >>> import jax.numpy as jnp
    >>> v = lambda params, x, t: params * x
    >>> x_0, noise = jnp.zeros((1, 2)), jnp.ones((1, 2))
    >>> teacher = lambda x, t: jnp.zeros_like(x)  # f(x, t) = x is consistent
    >>> loss, _ = continuous_consistency_loss(
    ...   v, 0.0, teacher, x_0, noise, jnp.array([0.5]))
    >>> loss
    Array([0.], dtype=float32)
  """
  _examples.check_arguments(x_0, t, frame_weight)
  return _two_time_loss(
    velocity,
    params,
    teacher,
    *_examples.clean_inputs(x_0, noise, t),
    jnp.zeros_like(t),
    tangent_weight=tangent_weight,
    normaliser_eps=normaliser_eps,
    tangent_pass=tangent_pass,
    tangent_step=tangent_step,
    frame_weight=frame_weight,
  )


def mean_flow_loss(
  velocity: Callable[[Params, Array, Array, Array], Array],
  params: Params,
  teacher: Velocity | None,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  t: Float[Array, "b *frames"],
  end_time: Float[Array, "b *frames"],
  *,
  tangent_weight: float | Float[Array, ""] = 1.0,
  normaliser_eps: float = 0.1,
  tangent_pass: TangentPass = "shared",
  tangent_step: float = TANGENT_STEP,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], ContinuousConsistencyMetrics]:
  """Learns the mean velocity from a time to an earlier one (MeanFlow).

  With s = `end_time`, the mean velocity u of the ODE from t to s satisfies

      g = -(sg(u) - v_T) - tangent_weight * (t - s) du/dt = 0,
      du/dt = JVP(u; (x_t, t, s), (v_T, 1, 0)),

  and u jumps by `x_s = x_t - (t - s) u`. At s = 0 this is
  `continuous_consistency_loss`, normalised alike. Gradient through u alone.

  Args:
    velocity: the student, `velocity(params, x_t, t, end_time)`.
    params: the parameters to differentiate.
    teacher: frozen velocity function; `None` trains from data alone, with
      `noise - x_0` in its place.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    t: rectified-flow times in [0, 1], one per frame.
    end_time: times s in [0, t].
    tangent_weight: weight of the tangent term.
    normaliser_eps: the constant c beside the norm of g.
    tangent_pass: see `continuous_consistency_loss`.
    tangent_step: likewise.
    frame_weight: weight of each frame; 0 removes it, its tangent too.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, a concrete time is out of range or
      before its end time, or `tangent_pass` is unknown.
  """
  _examples.check_arguments(x_0, t, frame_weight)
  _times.check_same_shape("end_time", end_time, t)
  _times.check_range("end_time", end_time)
  _times.check_order("end_time", end_time, t)
  clean = _examples.finite_examples((x_0, noise, t, end_time))
  x_0, noise, t, end_time = _examples.zero_examples(
    (x_0, noise, t, end_time), clean
  )
  return _two_time_loss(
    lambda p, x, time: velocity(p, x, time, end_time),
    params,
    teacher or (lambda x, time: noise - x_0),
    x_0,
    noise,
    t,
    clean,
    end_time,
    tangent_weight=tangent_weight,
    normaliser_eps=normaliser_eps,
    tangent_pass=tangent_pass,
    tangent_step=tangent_step,
    frame_weight=frame_weight,
  )


def trigflow_continuous_consistency_loss(
  velocity: ParametricVelocity,
  params: Params,
  teacher: Velocity,
  x_0: Float[Array, "b *shape"],
  noise: Float[Array, "b *shape"],
  angle: Float[Array, "b *frames"],
  *,
  tangent_weight: float | Float[Array, ""] = 1.0,
  normaliser_eps: float = 0.1,
  tangent_pass: TangentPass = "shared",
  tangent_step: float = TANGENT_STEP,
  frame_weight: Float[Array, "b *frames"] | None = None,
) -> tuple[Float[Array, "b"], ContinuousConsistencyMetrics]:
  """The continuous-time consistency loss of bidirectional rCM, in the angle.

  With the TrigFlow velocity F of the student, r = `tangent_weight`, and the
  tangent of F along `cos a sin a (F_T, 1)` written tF,

      g = -cos a sqrt(1 - r^2 sin^2 a) (sg(F) - F_T) - (r cos a sin a x_a + tF)
      loss = sum of (F - sg(F) - g / (||g|| + normaliser_eps))^2

  The warm-up weighs `x_a`, not tF, as in the reference. Its rectified-flow
  variant is `continuous_consistency_loss` at the same time. Gradient through
  F alone.

  Args:
    velocity: the student's rectified-flow velocity function.
    params: the parameters to differentiate.
    teacher: frozen rectified-flow velocity function.
    x_0: data, `[b, *frames, *features]`.
    noise: standard normal draws of the same shape.
    angle: TrigFlow angles in [0, pi/2], one per frame.
    tangent_weight: r above, warmed up from 0 to 1.
    normaliser_eps: the constant beside the norm of g.
    tangent_pass: see `continuous_consistency_loss`.
    tangent_step: likewise.
    frame_weight: weight of each frame; 0 removes it, its tangent too.

  Returns:
    The loss of each example, and metrics.

  Raises:
    ValueError: if a shape does not fit, a concrete angle is out of range, or
      `tangent_pass` is unknown.
  """
  _times.check_prefix("angle", angle, x_0)
  _times.check_same_shape("frame_weight", frame_weight, angle)
  _times.check_range("angle", angle, np.pi / 2)
  x_0, noise, angle, clean = _examples.clean_inputs(x_0, noise, angle)
  x = paths.trigflow_interpolate(x_0, noise, angle)
  f_teacher = _frozen(paths.trigflow_velocity(teacher), x, angle)

  speed = jnp.cos(angle) * jnp.sin(angle)
  speed *= _examples.moving(angle, frame_weight)
  f, df = _primal_and_tangent(
    lambda p, x, a: _trigflow(velocity, p)(x, a),
    params,
    (x, angle),
    (expand(speed, x) * f_teacher, speed),
    tangent_pass,
    tangent_step,
  )
  a = expand(angle, x)
  r, sin, cos = jnp.asarray(tangent_weight, a.dtype), jnp.sin(a), jnp.cos(a)
  root = jnp.sqrt(cos**2 + (1 - r**2) * sin**2)  # sqrt(1 - r^2 sin^2 a)
  gap = jax.lax.stop_gradient(f) - f_teacher
  g = -cos * root * gap - (r * cos * sin * wide(x) + df)
  return _regress(f, f_teacher, g, df, clean, normaliser_eps, frame_weight)


def _two_time_loss(
  velocity: ParametricVelocity,
  params: Params,
  teacher: Velocity,
  x_0: Array,
  noise: Array,
  t: Array,
  clean: Bool[Array, "b"],
  end_time: Array,
  *,
  tangent_weight,
  normaliser_eps: float,
  tangent_pass: TangentPass,
  tangent_step: float,
  frame_weight: Array | None,
):
  """Computes MeanFlow's loss, equations (15)-(18) at `end_time = 0`."""
  x_t = paths.interpolate(x_0, noise, t)
  v_teacher = _frozen(teacher, x_t, t)
  moves = _examples.moving(t, frame_weight)
  v, dv = _primal_and_tangent(
    velocity,
    params,
    (x_t, t),
    (expand(moves, x_t) * v_teacher, moves),
    tangent_pass,
    tangent_step,
  )
  r = jnp.asarray(tangent_weight, v.dtype)
  gap = jax.lax.stop_gradient(v) - v_teacher
  g = -gap - r * expand(t - end_time, x_t) * dv
  return _regress(v, v_teacher, g, dv, clean, normaliser_eps, frame_weight)


def _trigflow(velocity: ParametricVelocity, params: Params) -> Velocity:
  """Returns the student's TrigFlow velocity function."""
  return paths.trigflow_velocity(functools.partial(velocity, params))


def _frozen(teacher: Velocity, x: Array, t: Array) -> Array:
  """Returns the teacher's velocity without gradient."""
  v = _examples.check_velocity(teacher(x, t), x, "teacher")
  return jax.lax.stop_gradient(v)


def _primal_and_tangent(
  velocity: ParametricVelocity,
  params: Params,
  point: tuple[Array, Array],
  direction: tuple[Array, Array],
  tangent_pass: TangentPass,
  tangent_step: float,
) -> tuple[Array, Array]:
  """Returns the student's velocity, and its tangent without gradient."""
  direction = jax.tree.map(lambda d, p: d.astype(p.dtype), direction, point)
  at = lambda p: lambda x, t: velocity(p, x, t)
  stopped = at(jax.lax.stop_gradient(params))
  if tangent_pass == "shared":
    with _tangents.naming_cures(stopped, point, direction, tangent_pass):
      v, dv = jax.jvp(at(params), point, direction)
  elif tangent_pass == "separate":
    v = velocity(params, *point)
    with _tangents.naming_cures(stopped, point, direction, tangent_pass):
      _, dv = jax.jvp(stopped, point, direction)
  elif tangent_pass == "finite_difference":
    v = velocity(params, *point)
    dv = _tangents.central_difference(stopped, point, direction, tangent_step)
  else:
    raise ValueError(
      '`tangent_pass` must be "shared", "separate" or "finite_difference";'
      f" got {tangent_pass!r}."
    )
  v = _examples.check_velocity(v, point[0])
  return v, jax.lax.stop_gradient(wide(dv))


def _regress(
  v: Array,
  v_teacher: Array,
  g: Array,
  tangent: Array,
  clean: Bool[Array, "b"],
  normaliser_eps: float,
  frame_weight: Array | None,
) -> tuple[Float[Array, "b"], ContinuousConsistencyMetrics]:
  """Moves v by `g / (||g|| + c)`: equation (18), as the reference has it."""
  keep = _examples.keep_examples(v, clean, v_teacher, tangent)
  gap = jax.lax.stop_gradient(v) - v_teacher
  g, tangent, gap = _examples.zero_examples((g, tangent, gap), keep)
  normaliser = _examples.norm(g, frame_weight) + normaliser_eps
  step = g / expand(normaliser, g)
  residual = v - jax.lax.stop_gradient(v) - step
  loss = _examples.weighted_sum(jnp.square(residual), frame_weight)
  return loss, ContinuousConsistencyMetrics(
    tangent_norm=_examples.norm(tangent, frame_weight),
    teacher_gap=_examples.norm(gap, frame_weight),
    normaliser=normaliser,
    dropped=(~keep).astype(jnp.int32),
    student_non_finite=(~_examples.finite_examples(v)).astype(jnp.int32),
  )
