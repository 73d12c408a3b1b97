"""Micro-batches are one batch; working copies lose no update."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from crcm_jax import models, training
from crcm_jax.data import Batch
from crcm_jax.training import _accumulate
from crcm_jax.training._step import read_scalars

BATCH = 8
KEY = jax.random.key(3)


@pytest.fixture(autouse=True)
def _compile_fast():
  with tiny.compile_fast():
    yield


class Draws(NamedTuple):
  steps: jnp.ndarray
  t: jnp.ndarray
  shared: jnp.ndarray


class Metrics(NamedTuple):
  error: jnp.ndarray
  parts: jnp.ndarray
  dropped: jnp.ndarray
  mean: jnp.ndarray


@dataclasses.dataclass(frozen=True)
class Curve:
  """loss = (w sin(x + noise) + other - t)^2, noisy as a rollout's steps are."""

  other: str

  def draws(self, key, batch, counters):
    keys = jax.random.split(key, 3)
    size = batch.x_0.shape[0]
    steps = jax.random.normal(keys[0], (3, size, 2))
    # Iterations are part of the loss, so a wrong counter is a wrong loss.
    t = jax.random.normal(keys[1], (size,)) + counters.student
    return Draws(steps, t, jax.random.normal(keys[2], (3,)))

  def loss(self, trainable, frozen, batch, draws, counters):
    del counters
    x = batch.x_0[:, 0, 0, 0, 0] + batch.null_condition[0, 0]
    noise = jnp.einsum("sbi,s->b", draws.steps, draws.shared)
    shape = jnp.sin(jnp.outer(x + noise, jnp.arange(1.0, 4.0)))
    error = shape @ trainable["w"] + jnp.sum(frozen[self.other]["w"]) - draws.t
    parts = jnp.stack([error, 2 * error], axis=1)
    dropped = (error > 0).astype(jnp.int32)
    return error**2, Metrics(error, parts, dropped, jnp.mean(error))


def _batch(seed=0):
  x_0 = np.random.default_rng(seed).normal(size=(BATCH, 1, 1, 1, 1))
  null = jnp.full((1, 2), 0.3)  # one for all examples
  return Batch(jnp.asarray(x_0, jnp.float32), None, null)


OPTIMIZER = optax.adamw(0.05)


def _state():
  draw = lambda seed: jax.random.normal(jax.random.key(seed), (3,))
  return training.init_state(
    {"w": draw(1)},
    OPTIMIZER,
    fake={"w": draw(2)},
    fake_optimizer=OPTIMIZER,
  )


def _run(student_every, micro_batches, iterations):
  """Returns the state and all metrics after some iterations."""
  order = training.Alternation(student_every=student_every)
  make = lambda phase, other: training.make_train_step(
    Curve(other),
    OPTIMIZER,
    phase=phase,
    alternation=order,
    micro_batches=micro_batches,
  )
  student, critic = make("student", "fake"), make("critic", "student")
  state, rows = _state(), []
  for i in range(iterations):
    step = student if order.is_student(i) else critic
    state, metrics = step(state, {}, _batch(i), KEY)
    rows.append({k: float(v) for k, v in metrics.items()})
  return state, rows


@pytest.mark.parametrize("critics", [1, 5])
def test_micro_batches_are_one_batch(critics):
  """With so many critic updates for one of the student's."""
  iterations = 2 * (critics + 1) + 1
  want, want_rows = _run(critics + 1, 1, iterations)
  got, rows = _run(critics + 1, 4, iterations)
  assert int(got.student_updates) == 3
  assert int(got.fake_updates) == 2 * critics
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    if jnp.issubdtype(b.dtype, jnp.integer):
      assert a == b
    else:
      np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  for row, want_row in zip(rows, want_rows, strict=True):
    assert row.keys() == want_row.keys()
    for name, value in want_row.items():
      np.testing.assert_allclose(row[name], value, rtol=2e-4, atol=1e-5)
  assert any(row["dropped"] not in (0, BATCH) for row in want_rows)
  assert want_rows[0]["loss"] != want_rows[critics + 1]["loss"]


def test_a_bad_part_refuses_the_whole_update():
  step = training.make_train_step(Curve("fake"), OPTIMIZER, micro_batches=4)
  bad = _batch()._replace(x_0=_batch().x_0.at[5].set(jnp.nan))
  before = np.array(_state().student["w"])
  state, metrics = step(_state(), {}, bad, KEY)
  assert not np.isfinite(metrics["loss"])
  np.testing.assert_array_equal(state.student["w"], before)
  assert state.skipped == 1


def test_examples_of_a_device_are_spread_over_all_parts():
  """Each device holds neighbours: a part takes as many of every one."""
  seen = []

  def losses(params, batch, draws):
    del draws
    jax.debug.callback(lambda x: seen.append(x.tolist()), batch)
    return params * batch, ()

  _accumulate.gradient(
    losses,
    jnp.ones(()),
    jnp.arange(6.0),
    (),
    draw=lambda batch: (),
    micro_batches=3,
  )
  jax.effects_barrier()
  assert sorted(seen) == [[0, 3], [1, 4], [2, 5]]


def test_sums_are_made_in_float32():
  """A bfloat16 sum of these would stay at 256."""
  losses = lambda params, batch, draws: (params * batch, ())
  _, grads = _accumulate.gradient(
    losses,
    jnp.ones((), jnp.bfloat16),
    jnp.full(512, 1.0, jnp.bfloat16),
    (),
    draw=lambda batch: (),
    micro_batches=512,
  )
  assert grads == 1


def test_parts_must_divide_the_examples():
  step = training.make_train_step(Curve("fake"), OPTIMIZER, micro_batches=3)
  with pytest.raises(ValueError, match=r"batch_size` = 8; got 3"):
    step(_state(), {}, _batch(), KEY)


def test_a_draw_of_pairs_of_examples_is_refused():
  draw = lambda batch: jnp.ones((len(batch), len(batch)))
  batch = jnp.ones(4)
  with pytest.raises(ValueError, match=r"one axis.*\(4, 4\) and \(2, 2\)"):
    _accumulate.gradient(
      lambda params, batch, draws: (params * batch, ()),
      jnp.ones(()),
      batch,
      draw(batch),
      draw=draw,
      micro_batches=2,
    )


def _stage_steps(stage, batch_of, steps):
  """Runs the phases of a stage in turn, from random parameters."""
  draw = lambda seed: jax.tree.map(
    lambda a: 0.3 * jax.random.normal(jax.random.key(seed), a.shape),
    stage.state_shapes().student,
  )
  fake = draw(2) if stage.kind.critic else None
  state, run = stage._state(draw(1), fake), stage.train_steps()
  frozen = {role: draw(3) for role in stage.kind.frozen}
  rows = []
  for i in range(steps):
    step = run[stage.phase(i)]
    state, metrics = step(state, frozen, batch_of(i), stage.run_key())
    rows.append(read_scalars(metrics))
  return state, rows


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["SELF_FORCING", "JOINT", "MEAN_FLOW"])
def test_micro_batches_of_a_stage_are_one_batch(stage):
  section = getattr(tiny, stage)
  if "alternation" in section:  # a student's step, then a critic's
    section = section | dict(alternation=dict(student_every=2))
  rng = np.random.default_rng(0)

  def run(micro_batches):
    loop = dict(micro_batches=micro_batches)
    made = tiny.stage(**section, data=dict(batch_size=4), loop=loop)
    shapes = made.dataset.shapes()
    batch = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)
    return made, batch

  whole, batch = run(1)
  parts, _ = run(2)
  batch = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), batch)
  want, want_rows = _stage_steps(whole, lambda i: batch, 3)
  got, rows = _stage_steps(parts, lambda i: batch, 3)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = float(jnp.max(jnp.abs(b))) + 1e-6
    np.testing.assert_allclose(a, b, atol=1e-4 * scale)
  for row, want_row in zip(rows, want_rows, strict=True):
    for name, value in want_row.items():
      np.testing.assert_allclose(row[name], value, rtol=1e-3, atol=1e-4)


# --- Working copies ---


@dataclasses.dataclass(frozen=True)
class Slope:
  """A constant gradient of 1, and what the network read."""

  def draws(self, key, batch, counters):
    del key, batch, counters
    return ()

  def loss(self, trainable, frozen, batch, draws, counters):
    del frozen, draws, counters
    kernel = trainable["blocks"]["ffn"]["kernel"]
    narrow = jnp.float32(kernel.dtype == jnp.bfloat16)
    read = kernel.astype(jnp.float32)
    mean = jnp.sum(kernel.astype(jnp.float32)) * jnp.ones(batch.x_0.shape[0])
    return mean, {"narrow": narrow, "read": read[0]}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_tiny_updates_are_not_lost_beside_a_working_copy(micro_batches):
  optimizer = optax.sgd(1e-4)  # near 1, bfloat16 resolves 1/256
  step = training.make_train_step(
    Slope(), optimizer, copy_dtype="bfloat16", micro_batches=micro_batches
  )
  run = lambda dtype: training.init_state(
    {"blocks": {"ffn": {"kernel": jnp.ones((1,), dtype)}}}, optimizer
  )
  state, lost = run(jnp.float32), run(jnp.bfloat16)
  for _ in range(100):
    state, metrics = step(state, {}, _batch(), KEY)
  assert metrics["narrow"] == 1
  kernel = state.student["blocks"]["ffn"]["kernel"]
  assert kernel.dtype == jnp.float32
  np.testing.assert_allclose(kernel, 1 - 100e-4, rtol=1e-5)
  assert state.ema["blocks"]["ffn"]["kernel"] < 1
  # The copy follows its master, in its own steps.
  assert metrics["read"] == np.asarray(1 - 99e-4, jnp.bfloat16)
  # Without masters each update is rounded away.
  plain = training.make_train_step(Slope(), optimizer)
  for _ in range(3):
    lost, _ = plain(lost, {}, _batch(), KEY)
  assert lost.student["blocks"]["ffn"]["kernel"] == 1


@pytest.mark.parametrize(
  ("copy_dtype", "narrow"),
  [({"student": "bfloat16"}, 1), ({"teacher": "bfloat16"}, 0), ({}, 0)],
)
def test_each_role_has_a_copy_of_its_own(copy_dtype, narrow):
  optimizer = optax.sgd(1e-4)
  step = training.make_train_step(Slope(), optimizer, copy_dtype=copy_dtype)
  state = training.init_state(
    {"blocks": {"ffn": {"kernel": jnp.ones((1,), jnp.float32)}}}, optimizer
  )
  _, metrics = step(state, {}, _batch(), KEY)
  assert metrics["narrow"] == narrow


def test_networks_of_another_dtype_are_read_in_it(tmp_path):
  made = tiny.stage(
    **tiny.SELF_FORCING
    | dict(init=dict(real=str(tmp_path / "real.safetensors"))),
    network=dict(dtype="bfloat16"),
    networks=dict(real=dict(dtype="float32"), fake=dict(dtype="bfloat16")),
    working_copy=True,
  )
  dtypes = dict(student="bfloat16", real="float32", fake="bfloat16")
  assert made.copy_dtypes == dtypes
  params = jax.tree.map(
    lambda a: jnp.ones(a.shape, a.dtype), made.state_shapes().student
  )
  models.save_params(tmp_path / "real.safetensors", params, {})
  for frozen in (made.load_frozen(tmp_path), made.frozen_shapes()):
    up = frozen["real"]["blocks"]["ffn"]["up"]["kernel"]
    assert up.dtype == jnp.float32


def test_a_stage_keeps_frozen_networks_as_they_are_read(tmp_path):
  made = tiny.stage(
    network=dict(dtype="bfloat16"),
    working_copy=True,
    objective=dict(name="continuous_consistency"),
    init=dict(student="teacher", teacher=str(tmp_path / "teacher.safetensors")),
  )
  params = jax.tree.map(
    lambda a: jnp.ones(a.shape, a.dtype), made.state_shapes().student
  )
  models.save_params(tmp_path / "teacher.safetensors", params, {})
  teacher = made.load_frozen(tmp_path)["teacher"]
  assert teacher["blocks"]["ffn"]["up"]["kernel"].dtype == jnp.bfloat16
  assert teacher["head"]["out"]["kernel"].dtype == jnp.float32
  assert made.state_shapes().student["blocks"]["ffn"]["up"]["kernel"].dtype == (
    jnp.float32
  )
