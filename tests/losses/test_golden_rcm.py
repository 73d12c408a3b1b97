"""Bidirectional rCM against the reference: losses, gradients, sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from golden_losses import (
  draw_time,
  fast,
  law,
  neighbouring_times,
  per_frame,
  summed,
  texts,
  warmup,
)
from golden_networks import check_case, load, network, video
from parity import real
from quick_jit import quick_jit

from crcm_jax import guidance, losses, paths, sampling

pytestmark = pytest.mark.usefixtures("precision")

FIXED_ANGLES = (1.5, 1.4, 1.0)


def bidirectional(params, text):
  model, _ = network("student")

  def velocity(x, t):
    t = t if t.ndim == 2 else jnp.repeat(t[:, None], x.shape[1], axis=1)
    return model.apply({"params": params}, x, t, text)

  return velocity


def guided(params, texts, scale):
  v_c, v_u = (bidirectional(params, text) for text in texts)
  return guidance.classifier_free(v_c, v_u, scale)


@functools.partial(quick_jit, static_argnames=("loss", "guided_by"))
def consistency(
  params, teacher, x_0, noise, t, texts, settings, *, loss, guided_by
):
  velocity = lambda p, x, t: bidirectional(p, texts[0])(x, t)
  loss = functools.partial(loss, velocity, **settings)
  teacher = guided(teacher, texts, guided_by)
  return summed(loss)(params, teacher, x_0, noise, t)


CONSISTENCY = {
  "scm": losses.trigflow_continuous_consistency_loss,
  "rf_scm": losses.continuous_consistency_loss,
  "dcm": losses.trigflow_discrete_consistency_loss,
}


def run_consistency(case):
  kind = case.config["closures"][0]
  discrete = kind == "dcm"
  t = neighbouring_times(case, 5.0) if discrete else draw_time(case)
  (_, (loss, _)), grads = consistency(
    network("student")[1],
    network("bidirectional_teacher")[1],
    video(case, "x0"),
    video(case, "draw/eps"),
    t if kind == "rf_scm" else paths.angle_from_time(t),
    texts(case),
    {} if discrete else {"tangent_weight": warmup(case)},
    loss=CONSISTENCY[kind],
    guided_by=case.config["teacher_guidance"],
  )
  return loss, grads


@pytest.mark.parametrize(
  "name", fast("rcm_cm", "scm_warm250of1000_c1-3", "dcm_skip1_c1-1")
)
def test_consistency(name):
  case = load("rcm_cm", name)
  check_case("rcm_cm", case, *run_consistency(case))


def rollout_times(case):
  """Returns the time of each step, `[b]`; random ones never rise."""
  steps = sum(name.startswith("draw/rollout_noise") for name in case.arrays)
  times = [jnp.ones(case["draw/D_eps"].shape[0])]
  for step in range(steps - 1):
    if case.config.get("dmd_fix_timesteps", False):
      angle = jnp.full_like(times[0], FIXED_ANGLES[step])
      times.append(paths.time_from_angle(angle))
    else:
      raw = real(case[f"draw/rollout_time_raw_{step}"])[:, 0]
      drawn = law(case, "p_D").from_raw(raw)
      times.append(jnp.minimum(drawn, times[-1]))
  return times


def roll_out(velocity, times, noises):
  """Returns samples; gradient flows through the last step alone.

  In rectified-flow units rCM's rollout is the few-step sampler.
  """
  x = noises[0]
  for step, t in enumerate(times):
    if step:
      x_t = paths.interpolate(x, noises[step], t)
      x = jax.lax.stop_gradient(x_t)
    x = paths.data_prediction(x, velocity(x, t), t)
  return x


def score_arguments(case):
  """Returns times and noises of the rollout, and of what scores it."""
  times = rollout_times(case)
  noises = [video(case, f"draw/rollout_noise_{i}") for i in range(len(times))]
  t = law(case, "p_D").from_raw(real(case["draw/D_time_raw"]))
  return times, noises, video(case, "draw/D_eps"), per_frame(t, case)


@functools.partial(quick_jit, static_argnames="guided_by")
def matching(params, real, fake, texts, times, noises, noise, t, *, guided_by):
  def total(params):
    samples = roll_out(bidirectional(params, texts[0]), times, noises)
    loss, _ = losses.distribution_matching_loss(
      samples,
      noise,
      t,
      guided(real, texts, guided_by),
      bidirectional(fake, texts[0]),
    )
    return loss.sum(), (loss, samples)

  (_, aux), grads = jax.value_and_grad(total, has_aux=True)(params)
  return *aux, grads


def run_matching(case):
  return matching(
    network("student")[1],
    network("bidirectional_teacher")[1],
    network("fake_score")[1],
    texts(case),
    *score_arguments(case),
    guided_by=case.config["teacher_guidance"],
  )


@pytest.mark.parametrize(
  "name",
  [
    "dmd_1step_c1-1",
    pytest.param("dmd_3step_randomt_c1-1", marks=pytest.mark.slow),
    pytest.param("dmd_4step_fixt_c1-3", marks=pytest.mark.slow),
  ],
)
def test_distribution_matching(name):
  case = load("rcm_dmd", name)
  loss, samples, grads = run_matching(case)
  recorded = video(case, "mid/G_x0") if "mid/G_x0" in case else samples
  parity.check(f"rcm_dmd/{name}", "samples", samples, recorded)
  check_case("rcm_dmd", case, loss, grads)


@quick_jit
def critic(fake, student, text, times, noises, noise, t):
  samples = roll_out(bidirectional(student, text), times, noises)
  angle = paths.angle_from_time(t)
  weight = (jnp.cos(angle) + jnp.sin(angle)) ** -2

  def total(fake):
    loss, _ = losses.critic_loss(
      lambda p, x, t: bidirectional(p, text)(x, t),
      fake,
      samples,
      noise,
      t,
      weight=weight,
      reduction="sum",
    )
    return loss.sum(), loss

  return jax.grad(total, has_aux=True)(fake)


def test_critic():
  case = load("rcm_dmd", "critic_2step_c1-1")
  grads, loss = critic(
    network("fake_score")[1],
    network("student")[1],
    texts(case)[0],
    *score_arguments(case),
  )
  check_case("rcm_dmd", case, loss, grads)


@pytest.mark.slow
def test_consistency_and_distribution_matching_add_up():
  case = load("rcm_dmd", "scm_plus_dmd_c1-1")
  scm, scm_grads = run_consistency(case)
  dmd, _, dmd_grads = run_matching(case)
  for part, loss in (("scm", scm), ("dmd", dmd)):
    recorded = case[f"loss_{part}"]
    parity.check_each(f"rcm_dmd/{case.name}", f"loss {part}", loss, recorded)
  grads = jax.tree.map(jnp.add, scm_grads, dmd_grads)
  check_case("rcm_dmd", case, scm + dmd, grads)


def test_sampler():
  """rCM starts from unscaled noise at the angle atan(sigma_max)."""
  case = load("rcm_dmd", "sampler_4step_c1-1")
  angles = real(case["t_steps"])
  first = jnp.arctan(jnp.asarray(float(case.config["sigma_max"])))
  expected = [first, *FIXED_ANGLES, 0.0]
  parity.check("rcm_dmd/sampler_4step_c1-1", "times", expected, angles)
  times = np.asarray(paths.time_from_angle(angles))

  @quick_jit
  def sample(params, text, noise, step_noise):
    return sampling.consistency_sample(
      bidirectional(params, text),
      noise,
      times,
      step_noise,
      initial_scale=1 / (jnp.cos(first) + jnp.sin(first)),
    )

  steps = [video(case, f"draw/step_noise_{i}") for i in range(len(angles) - 2)]
  text, noise = real(case["crossattn_emb"]), video(case, "draw/init_noise")
  got = sample(network("student")[1], text, noise, jnp.stack(steps))
  want = video(case, "out")
  parity.check("rcm_dmd/sampler_4step_c1-1", "sample", got, want)
