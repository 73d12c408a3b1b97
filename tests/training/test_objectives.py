"""Each objective on a tiny network: draws, one step, bad data, settings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import GOLDEN
from quick_jit import quick_jit
from tiny_wan import CONFIG, inputs, params

from crcm_jax import ChunkPattern, models
from crcm_jax.data import Batch
from crcm_jax.testing import GaussianTeacher, golden
from crcm_jax.time_sampling import ShiftedUniform
from crcm_jax.training import Alternation, objectives
from crcm_jax.training.objectives import _inputs, _self_forcing

MODEL = models.Wan(CONFIG)
JUMPING = models.Wan(dataclasses.replace(CONFIG, end_time=True))
PATTERN = ChunkPattern(1, 1)
NETWORKS = {name: MODEL for name in ("student", "teacher", "real", "fake")} | {
  "pattern": PATTERN
}
FRAMES = 3
START = Alternation().counters(0)
MID_TIMES = ((0.9, 0.5), (0.5,))
KINDS = {
  "bidirectional": (objectives.BidirectionalDiffusion, {}),
  "teacher_forcing": (objectives.TeacherForcing, {"context_times": (0.0, 0.5)}),
  "diffusion_forcing": (objectives.DiffusionForcing, {}),
  "discrete": (objectives.DiscreteConsistency, {"skip": 2}),
  "continuous": (objectives.ContinuousConsistency, {"tangent_warmup": 0}),
  "mean_flow": (
    objectives.MeanFlow,
    {"student": JUMPING, "tangent_warmup": 0, "context_times": (0.0, 0.5)},
  ),
  "ode_regression": (
    objectives.OdeRegression,
    {"mid_times": MID_TIMES, "ode_steps": 6},
  ),
  "bidirectional_ode_regression": (
    objectives.BidirectionalOdeRegression,
    {"mid_times": MID_TIMES, "ode_steps": 6},
  ),
  "self_forcing": (
    objectives.SelfForcing,
    {"mid_times": MID_TIMES, "context": "last_step"},
  ),
  "critic": (objectives.Critic, {"mid_times": MID_TIMES}),
}


def _key():
  """The same key each time: JAX's own check refuses to use one twice."""
  return jax.random.key(0)


def _make(kind, **settings):
  cls, more = KINDS[kind]
  given = {k: v for k, v in NETWORKS.items() if k in cls.__dataclass_fields__}
  return cls(**{**given, **more, **settings})


def _batch():
  _, _, text, clean = inputs(FRAMES)
  return Batch(
    x_0=clean, condition=text, null_condition=jnp.zeros_like(text[0])
  )


FROZEN = {
  name: functools.partial(params, seed=seed)
  for seed, name in enumerate(("student", "teacher", "real", "fake"), start=1)
}


@functools.cache
def _compiled(kind):
  objective = _make(kind)

  @quick_jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(trainable, frozen, batch, key, iteration):
    counters = Alternation(student_every=2).counters(iteration)
    draws = objective.draws(key, batch, counters)
    loss, metrics = objective.loss(trainable, frozen, batch, draws, counters)
    return loss.sum(), (loss, metrics)

  def call(batch, trainable=None):
    frozen = {name: make() for name, make in FROZEN.items()}
    if trainable is None:
      trainable = params(objective.student.config)
    (_, aux), grads = run(trainable, frozen, batch, _key(), jnp.array(1))
    return *aux, grads

  return call


@pytest.mark.parametrize("kind", KINDS)
def test_objective_has_a_loss_and_a_gradient(kind):
  loss, metrics, grads = _compiled(kind)(_batch())
  assert loss.shape == (2,)
  assert np.isfinite(loss).all()
  assert (loss > 0).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert any(np.any(g) for g in jax.tree.leaves(grads))
  assert metrics.dropped.tolist() == [0, 0]
  assert isinstance(_make(kind), objectives.Objective)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", ["x_0", "condition"])
def test_bad_data_costs_its_own_example(kind, field):
  batch = _batch()
  bad = batch._replace(**{field: getattr(batch, field).at[1].set(jnp.nan)})
  loss, metrics, grads = _compiled(kind)(bad)
  good, _, _ = _compiled(kind)(batch)
  np.testing.assert_allclose(loss, good * jnp.array([1.0, 0.0]), rtol=1e-5)
  assert metrics.dropped.tolist() == [0, 1]
  assert metrics.student_non_finite.tolist() == [0, 0]
  assert all(np.isfinite(g).all() for g in jax.tree.leaves((grads, metrics)))


def test_the_chunks_parts_of_the_gradient_add_up():
  _, metrics, _ = _compiled("self_forcing")(_batch())
  parts = metrics.chunk_gradient_norm
  assert parts.shape == (2, 3)
  assert (parts > 0).all()
  np.testing.assert_allclose(
    jnp.square(parts).sum(axis=1), metrics.gradient_norm**2, rtol=1e-5
  )


def test_a_chunks_part_is_the_norm_of_its_frames():
  x = jnp.zeros((1, 3, 1, 2, 2)).at[:, 1:].set(3.0)  # 1 frame, 2 frames
  norms = _self_forcing._chunk_norms(x, ChunkPattern(1, 2))
  np.testing.assert_allclose(norms, [[0.0, 3.0 * np.sqrt(8)]], rtol=1e-6)


def test_the_critics_error_is_sorted_by_time():
  _, metrics, _ = _compiled("critic")(_batch())
  value, present = metrics.error_by_time
  assert value.shape == present.shape == (2, _self_forcing.TIME_BUCKETS)
  np.testing.assert_array_equal(present.sum(axis=1), 1)
  np.testing.assert_allclose(value.sum(axis=1), metrics.error, rtol=1e-6)


def test_times_fall_into_buckets_of_equal_width():
  t = jnp.array([0.0, 0.24, 0.25, 0.99, 1.0, 0.6])
  values, keep = jnp.arange(1.0, 7.0), jnp.arange(6) < 5
  masked = _self_forcing._by_time(values, t, keep)
  buckets = [0, 0, 1, 3, 3]
  expected = np.zeros((6, 4))
  expected[range(5), buckets] = [1, 2, 3, 4, 5]
  np.testing.assert_array_equal(masked.value, expected)
  np.testing.assert_array_equal(masked.present, expected > 0)


def test_bad_student_shows_in_the_loss():
  broken = jax.tree.map(lambda p: p.at[(0,) * p.ndim].set(jnp.nan), params())
  loss, metrics, _ = _compiled("teacher_forcing")(_batch(), broken)
  assert np.isnan(loss).all()
  assert metrics.student_non_finite.tolist() == [1, 1]
  assert metrics.dropped.tolist() == [0, 0]


def test_captions_are_dropped_for_the_null_one():
  batch = _batch()
  made = _inputs.prepare(batch, jnp.array([True, False]))
  np.testing.assert_array_equal(made.condition[0], batch.null_condition)
  np.testing.assert_array_equal(made.condition[1], batch.condition[1])
  many = batch._replace(x_0=jnp.zeros((4000, 1, 1, 1, 1)))
  for kind in ("bidirectional", "teacher_forcing", "diffusion_forcing"):
    share = _make(kind).draws(_key(), many, START).drop.mean()
    assert 0.08 < share < 0.12


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("start", [0, 1, 3])
def test_noisy_context_has_the_references_times(start):
  misc = golden.load(GOLDEN / "misc.npz")
  history = jnp.zeros((1, 7, 1, 1, 1))
  cases = {
    "default_tf": (5 / 8,),
    "default_tf_scm_sf_dmd": (5 / 8,),
    "sched42_tf": (5 / 8,),  # SPEC S8: not its own schedules' 5/6
    "sched42_tf_scm_sf_dmd": (5 / 8, 5 / 6),
    "sched42n_tf": (5 / 8,),
    "sched42n_tf_scm_sf_dmd": (5 / 8, 5 / 8),
  }
  for name, last in cases.items():
    times = ((0.0,) * start) + (last[start:] or last[-1:])
    context, t = _inputs.noisy_history(
      history, jnp.ones_like(history), times, ChunkPattern(1, 3)
    )
    want = misc[key := f"ctx_time_{name}_start{start}_c1-3"]
    parity.check("misc", key, t[0], want)
    parity.check("misc", key, context[0, :, 0, 0, 0], want)


def test_chunk_times_are_shared_as_told():
  batch = _batch()
  draw = lambda how: _make("diffusion_forcing", chunk_times=how).draws(
    _key(), batch, START
  )
  same, free, rising = map(draw, ("same", "random", "monotone"))
  assert np.ptp(same.t, axis=1).max() == 0
  assert np.ptp(free.t, axis=1).min() > 0
  assert (np.diff(rising.t, axis=1) >= 0).all()


def test_grid_of_discrete_consistency():
  times = _make("discrete", total_steps=4, skip=2)._times(
    jnp.array([0.0, 1.0]), jnp.zeros((2, 3, 1, 1, 1))
  )
  assert times.shape == (2, 3, 3)
  # s = 1, 3/4, 1/2 and 1/2, 1/4, 0, shifted by 3.
  np.testing.assert_allclose(times[0, 0], [1, 0.9, 0.75], atol=1e-6)
  np.testing.assert_allclose(times[1, 0], [0.75, 0.5, 0], atol=1e-6)


def test_mean_flow_draws_ordered_times_and_both_ends():
  many = _batch()._replace(x_0=jnp.zeros((4000, 1, 1, 1, 1)))
  drawn = _make("mean_flow").draws(_key(), many, START)
  assert (drawn.end_time <= drawn.t).all()
  shares = ((drawn.end_time == drawn.t).mean(), (drawn.end_time == 0).mean())
  np.testing.assert_allclose(shares, (0.25, 0.25), atol=0.02)
  free = _make("mean_flow", same_share=0.0, data_share=0.0)
  drawn = free.draws(_key(), many, START)
  assert ((drawn.end_time < drawn.t) & (drawn.end_time > 0)).all()


def test_ode_regression_gives_each_chunk_times_of_its_own():
  """MID_TIMES: 0.9 and 0.5 in chunk 0, 0.5 in all others, and the first."""
  objective = _make("ode_regression")
  first = 1600 / 1601
  np.testing.assert_allclose(objective._times(), [first, 0.9, 0.5, 0])
  u = jnp.array([[0.0, 0.0, 0.0], [0.4, 0.49, 0.51], [0.99, 0.99, 0.99]])
  places = objective._places(u, FRAMES)
  assert places.tolist() == [[0, 0, 0], [1, 0, 2], [2, 2, 2]]


def test_tangent_warms_up():
  weight = lambda i: float(
    _inputs.warmed_up(10, Alternation().counters(i), jnp.ones(()))
  )
  assert [weight(i) for i in (0, 5, 10, 99)] == [0, 0.5, 1, 1]


def test_joint_waits_for_its_parts():
  tf = _make("teacher_forcing", loss_scale=1.0)
  both = objectives.Joint(objectives=(tf, tf), starts=(0, 2))
  batch = _batch()

  @quick_jit
  def run(iteration):
    counters = Alternation().counters(iteration)
    draws = both.draws(_key(), batch, counters)
    return both.loss(params(), {}, batch, draws, counters)

  for iteration in (1, 2):
    total, metrics = run(jnp.array(iteration))
    first, second = metrics.losses
    assert bool(second.any()) == (iteration >= 2)
    np.testing.assert_allclose(total, first + second, rtol=1e-6)


@pytest.mark.parametrize(
  ("kind", "settings", "message"),
  [
    ("diffusion_forcing", {"chunk_times": "rising"}, "`chunk_times` must be"),
    ("discrete", {"skip": 0}, "`skip` must lie between 1 and .* = 47; got 0"),
    ("self_forcing", {"replay": "twice"}, "`replay` must be.*got 'twice'"),
    ("self_forcing", {"mid_times": ((0.5, 0.7),)}, "must decrease"),
    ("mean_flow", {"same_share": 0.9}, r"add up to at most 1; got \(0.9, 0.25"),
    ("ode_regression", {"mid_times": ((1.0,),)}, "`mid_times` must decrease"),
    ("critic", {"mid_times": ((), (0.5,))}, r"longer .* got \[1, 2\]"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_make_no_sense_are_refused(kind, settings, message):
  with pytest.raises(ValueError, match=message):
    _make(kind, **settings)


@pytest.mark.usefixtures("unchecked")
def test_unknown_weighting_and_missing_starts_are_refused():
  objective, batch = _make("bidirectional", weighting="bell"), _batch()
  with pytest.raises(ValueError, match=r"`weighting` must be.*got 'bell'"):
    objective.loss(
      params(), {}, batch, objective.draws(_key(), batch, START), START
    )
  with pytest.raises(ValueError, match=r"`starts` must hold one .* 1 obj"):
    objectives.Joint(objectives=(objective,), starts=())


TEACHER = GaussianTeacher(np.zeros((1, 1, 2)), [[0.5, 0.2], [0.2, 0.3]])


class Exact:
  """Networks whose videos are Gaussian frames, independent of each other."""

  def apply(self, variables, x, t, text, end_time=None, **mode):
    del text, mode
    off = variables["params"]
    if self is TEACHES:
      return TEACHER.velocity(x, t) + off
    if end_time is None:
      return TEACHER.consistency_velocity(x, t) + off
    gap = (t - end_time)[..., None, None, None]
    jump = x - TEACHER.flow_map(x, t, end_time)
    mean = jump / jnp.where(gap > 0, gap, 1)
    return jnp.where(gap > 0, mean, TEACHER.velocity(x, t)) + off


TEACHES, KNOWS = Exact(), Exact()


def _exactly(kind, off, **settings):
  """Loss and metrics of a student `off` the exact one."""
  objective = _make(kind, student=KNOWS, teacher=TEACHES, **settings)
  key = jax.random.key(0)
  batch = Batch(
    x_0=TEACHER.sample(key, 32 * FRAMES).reshape(32, FRAMES, 1, 1, 2),
    condition=jnp.zeros((32, 1, 1)),
    null_condition=jnp.zeros((1, 1)),
  )

  @quick_jit
  def run(off):
    draws = objective.draws(_key(), batch, START)
    return objective.loss(
      off, {"teacher": jnp.zeros(())}, batch, draws, START
    ), draws

  return run(jnp.array(off))


def test_mean_flow_vanishes_at_the_exact_mean_velocity():
  """Whatever the end: t itself, data, or between."""
  settings = dict(time=ShiftedUniform(1.0), context_times=(0.0,))
  (_, metrics), draws = _exactly("mean_flow", 0.0, **settings)
  assert (draws.end_time == draws.t).any()
  assert (draws.end_time == 0).any()
  np.testing.assert_allclose(metrics.normaliser, 0.1, atol=1e-2)
  (_, metrics), _ = _exactly("mean_flow", 0.5, **settings)
  assert (metrics.normaliser > 0.5).all()


def test_ode_regression_vanishes_at_the_exact_flow_map():
  """But for the error of Euler's steps, which falls with their square."""
  loss = lambda off, steps: _exactly(
    "ode_regression", off, mid_times=((0.9, 0.5),), ode_steps=steps
  )[0][0].max()
  coarse, fine = loss(0.0, 25), loss(0.0, 100)
  assert 10 < coarse / fine < 25
  assert fine < 1e-2 < loss(1.0, 100)
