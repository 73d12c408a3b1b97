"""The train step: state, phases, randomness, and updates it refuses."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crcm_jax import losses, training
from crcm_jax.data import Batch
from crcm_jax.training import _step, objectives


class Draws(NamedTuple):
  noise: jnp.ndarray


class Metrics(NamedTuple):
  error: jnp.ndarray
  parts: jnp.ndarray
  dropped: jnp.ndarray


@dataclasses.dataclass(frozen=True)
class Line:
  """loss = (w x + other - noise)^2, where `other` is a frozen network."""

  other: str | None = None

  def draws(self, key, batch, counters):
    return Draws(jax.random.normal(key, batch.x_0.shape[:1]))

  def loss(self, trainable, frozen, batch, draws, counters):
    x = batch.x_0[:, 0, 0, 0, 0]
    other = frozen[self.other]["w"] if self.other else 0.0
    error = trainable["w"] * x + other - draws.noise
    parts = jnp.stack([error, 2 * error], axis=1)
    return error**2, Metrics(error, parts, jnp.ones(x.shape, jnp.int32))


OPTIMIZER = optax.adam(0.1)
KEY = jax.random.key(3)


def _batch(value=1.0):
  x_0 = jnp.ones((2, 1, 1, 1, 1)).at[1].set(value)
  return Batch(x_0=x_0, condition=None, null_condition=None)


def _state(fake=False):
  params = {"w": jnp.array(0.5)}
  if not fake:
    return training.init_state(params, OPTIMIZER)
  return training.init_state(
    params,
    OPTIMIZER,
    fake={"w": jnp.array(-1.0)},
    fake_optimizer=OPTIMIZER,
  )


def test_student_step_counts_and_averages():
  step = training.make_train_step(Line(), OPTIMIZER)
  state, metrics = step(_state(), {}, _batch(), KEY)
  assert (int(state.step), int(state.student_updates)) == (1, 1)
  # The first update copies the parameters into the average.
  np.testing.assert_array_equal(state.ema["w"], state.student["w"])
  assert sorted(metrics) == [
    *("dropped", "ema_decay", "error", "grad_norm", "loss"),
    *("parts/0", "parts/1", "skipped"),
  ]
  assert metrics["dropped"] == 2  # A count is summed, a value averaged.
  np.testing.assert_allclose(
    metrics["parts/1"], 2 * metrics["error"], rtol=1e-6
  )
  assert metrics["ema_decay"] == 0
  state, metrics = step(state, {}, _batch(), KEY)
  beta, rest = training.ema_beta(jnp.array(1), training.ema_exponent(0.1))
  assert 0 < beta < rest < 1
  np.testing.assert_allclose(metrics["ema_decay"], beta, rtol=1e-6)
  assert state.ema["w"] != state.student["w"]


def test_xla_knows_the_options_for_gpus(monkeypatch):
  """Any device's compiler refuses an option that is no more; not a pass."""
  monkeypatch.setattr(_step, "target_platform", lambda: "gpu")
  step = training.make_train_step(Line(), OPTIMIZER)
  state, _ = step(_state(), {}, _batch(), KEY)
  assert int(state.step) == 1


def test_loss_is_the_mean_of_its_draws():
  noise = Line().draws(jax.random.fold_in(KEY, 0), _batch(), None).noise
  step = training.make_train_step(Line(), OPTIMIZER)
  _, metrics = step(_state(), {}, _batch(), KEY)
  np.testing.assert_allclose(
    metrics["loss"], np.mean((0.5 - noise) ** 2), rtol=1e-5
  )


def test_draws_follow_the_step_and_resuming_repeats_them():
  step = training.make_train_step(Line(), OPTIMIZER)
  state, first = step(_state(), {}, _batch(), KEY)
  copy = jax.tree.map(jnp.array, state)
  state, second = step(state, {}, _batch(), KEY)
  assert first["error"] != second["error"]
  resumed, again = step(copy, {}, _batch(), KEY)
  assert again["error"] == second["error"]
  assert resumed.student["w"] == state.student["w"]


def test_phases_train_their_own_network_on_the_other():
  order = training.Alternation(student_every=2)
  student = training.make_train_step(Line("fake"), OPTIMIZER, alternation=order)
  critic = training.make_train_step(
    Line("student"), OPTIMIZER, phase="critic", alternation=order
  )
  state, _ = student(_state(fake=True), {}, _batch(), KEY)
  assert state.student["w"] != 0.5
  assert state.fake["w"] == -1.0
  w, ema = float(state.student["w"]), float(state.ema["w"])
  state, _ = critic(state, {}, _batch(), KEY)
  assert (state.student["w"], state.ema["w"]) == (w, ema)
  assert state.fake["w"] != -1.0
  counts = (state.step, state.student_updates, state.fake_updates)
  assert tuple(map(int, counts)) == (2, 1, 1)
  np.testing.assert_array_equal(_adam_count(state.student_opt_state), 1)


def _adam_count(opt_state):
  return opt_state[0].count


@pytest.mark.parametrize("phase", ["student", "critic"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_update_that_is_not_finite_changes_nothing_but_its_count(phase, bad):
  other = "fake" if phase == "student" else "student"
  step = training.make_train_step(Line(other), OPTIMIZER, phase=phase)
  before = jax.tree.map(np.array, _state(fake=True))
  state, metrics = step(_state(fake=True), {}, _batch(bad), KEY)
  assert not np.isfinite(metrics["loss"])
  assert metrics["skipped"] == state.skipped == 1
  for field in dataclasses.fields(state):
    if field.name in ("step", "skipped"):
      continue
    for got, want in zip(
      jax.tree.leaves(getattr(state, field.name)),
      jax.tree.leaves(getattr(before, field.name)),
      strict=True,
    ):
      np.testing.assert_array_equal(got, want, err_msg=field.name)
  # It goes on as if nothing had been.
  state, metrics = step(state, {}, _batch(), KEY)
  assert np.isfinite(metrics["loss"])
  assert (int(state.step), int(state.skipped)) == (2, 1)


@dataclasses.dataclass(frozen=True)
class Steep:
  """loss = sqrt(w - 1/2): finite at w = 1/2, its gradient is not."""

  def draws(self, key, batch, counters):
    del key, batch, counters

  def loss(self, trainable, frozen, batch, draws, counters):
    del frozen, draws, counters
    root = jnp.sqrt(trainable["w"] - 0.5)
    return root * jnp.ones(batch.x_0.shape[0]), ()


def test_a_finite_loss_with_a_gradient_that_is_not_is_refused():
  step = training.make_train_step(Steep(), OPTIMIZER)
  state, metrics = step(_state(), {}, _batch(), KEY)
  assert metrics["loss"] == 0
  assert not np.isfinite(metrics["grad_norm"])
  assert state.skipped == 1
  assert state.student["w"] == state.ema["w"] == 0.5


@dataclasses.dataclass(frozen=True)
class Consistent:
  """Continuous-time consistency of v = w x with a teacher, as a stage has it.

  Attributes:
    bad: what example 1's teacher adds to its velocity.
    weighted: whether example 1 has no weight.
  """

  bad: float = 0.0
  weighted: bool = False

  def draws(self, key, batch, counters):
    del counters
    return Draws(jax.random.normal(key, batch.x_0.shape))

  def loss(self, trainable, frozen, batch, draws, counters):
    del frozen, counters
    extra = jnp.zeros(batch.x_0.shape).at[1].set(self.bad)
    weight = jnp.ones((2, 1)).at[1].set(0) if self.weighted else None
    return losses.continuous_consistency_loss(
      lambda params, x, t: params["w"] * x * t[..., None, None, None],
      trainable,
      lambda x, t: extra - x,
      batch.x_0,
      draws.noise,
      jnp.full((2, 1), 0.5),
      frame_weight=weight,
    )


@pytest.mark.parametrize("phase", ["student", "critic"])
def test_the_learning_rate_is_that_of_the_phases_own_update(phase):
  rate = lambda updates: 0.1 * (1 + updates)
  step = training.make_train_step(
    Line(),
    OPTIMIZER,
    phase=phase,
    alternation=training.Alternation(student_every=3),
    learning_rate=rate,
  )
  state = _state(fake=True)
  rates = []
  for _ in range(3):
    state, metrics = step(state, {}, _batch(), KEY)
    rates.append(metrics["learning_rate"])
  np.testing.assert_allclose(rates, [0.1, 0.2, 0.3], rtol=1e-6)


class Partly(NamedTuple):
  error: objectives.Masked


class Bucketed(Line):
  """A metric of two parts: both examples have the first, none the second."""

  def loss(self, trainable, frozen, batch, draws, counters):
    loss, _ = super().loss(trainable, frozen, batch, draws, counters)
    present = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    value = jnp.array([[2.0, 0.0], [4.0, 0.0]])
    return loss, Partly(objectives.Masked(value, present))


def test_a_metric_that_no_example_has_is_left_out():
  step = training.make_train_step(Bucketed(), OPTIMIZER)
  _, metrics = step(_state(), {}, _batch(), KEY)
  numbers = _step.read_scalars(metrics)
  assert numbers["error/0"] == 3.0
  assert "error/1" not in numbers
  assert numbers["loss"] == float(metrics["loss"])


@pytest.mark.parametrize("where", ["data", "teacher"])
def test_a_bad_example_costs_the_update_only_its_own_part(where):
  in_data = where == "data"
  objective = Consistent(bad=0.0 if in_data else jnp.nan)
  step = training.make_train_step(objective, OPTIMIZER)
  batch = _batch(jnp.nan if in_data else 1.0)
  state, metrics = step(_state(), {}, batch, KEY)
  good = training.make_train_step(Consistent(weighted=True), OPTIMIZER)
  want, _ = good(_state(), {}, _batch(), KEY)
  assert metrics["dropped"] == 1
  assert metrics["student_non_finite"] == metrics["skipped"] == 0
  assert np.isfinite(metrics["loss"])
  for got, expected in zip(
    jax.tree.leaves((state.student, state.student_opt_state, state.ema)),
    jax.tree.leaves((want.student, want.student_opt_state, want.ema)),
    strict=True,
  ):
    np.testing.assert_allclose(got, expected, rtol=1e-5)
  assert state.student["w"] != 0.5


def test_state_is_donated_and_starts_from_copies():
  params = {"w": jnp.array(0.5)}
  state = training.init_state(
    params, OPTIMIZER, fake=params, fake_optimizer=OPTIMIZER
  )
  step = training.make_train_step(Line("fake"), OPTIMIZER)
  step(state, {"real": params}, _batch(), KEY)
  assert state.student["w"].is_deleted()
  assert float(params["w"]) == 0.5


def test_average_is_at_least_float32():
  params = {"w": jnp.array(0.5, jnp.bfloat16)}
  assert training.init_state(params, OPTIMIZER).ema["w"].dtype == jnp.float32


def test_shardings_are_kept():
  mesh = jax.make_mesh((1,), ("data",))
  everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state = _state()
  step = training.make_train_step(
    Line(),
    OPTIMIZER,
    shardings=training.Shardings(
      state=jax.tree.map(lambda _: everywhere, state), batch=everywhere
    ),
  )
  state, _ = step(state, {}, _batch(), KEY)
  assert all(a.sharding == everywhere for a in jax.tree.leaves(state))


@pytest.mark.usefixtures("unchecked")
def test_unknown_phases_are_refused():
  with pytest.raises(ValueError, match=r"`phase` must be .*got 'teacher'"):
    training.make_train_step(Line(), OPTIMIZER, phase="teacher")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"fake": {"w": jnp.ones(())}}, "belong together; got only `fake`"),
    ({"fake_optimizer": OPTIMIZER}, "got only `fake_optimizer`"),
  ],
)
def test_half_a_critic_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    training.init_state({"w": jnp.ones(())}, OPTIMIZER, **settings)
