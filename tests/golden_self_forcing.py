"""Self-forcing objectives and their draws from recorded cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_networks import network, pattern, video
from parity import real
from quick_jit import quick_jit

from crcm_jax.data import Batch
from crcm_jax.training import Alternation, objectives
from crcm_jax.training.objectives._self_forcing import SelfForcingDraws

DEFAULT = [[15 / 16, 5 / 6, 5 / 8]]


def settings(case):
  """Returns the objective's settings of a recorded configuration."""
  config = case.config
  noisy = config.get("context_from_last_step", False)
  schedules = config.get("sf_backward_timestep_schedules", DEFAULT)
  return {
    "pattern": pattern(case),
    "mid_times": tuple(map(tuple, schedules)),
    "context": "last_step" if noisy else "clean",
    "context_start": config.get("context_from_last_step_start_chunk", 0),
  }


def self_forcing(case, replay="parallel"):
  return objectives.SelfForcing(
    student=network("student")[0],
    real=network("bidirectional_teacher")[0],
    fake=network("fake_score")[0],
    guidance=case.config["bidirectional_guidance"],
    replay=replay,
    **settings(case),
  )


def critic(case):
  return objectives.Critic(
    student=network("student")[0],
    fake=network("fake_score")[0],
    **settings(case),
  )


def frozen():
  return {
    "student": network("student")[1],
    "teacher": network("causal_teacher")[1],
    "real": network("bidirectional_teacher")[1],
    "fake": network("fake_score")[1],
  }


def batch(case):
  return Batch(
    x_0=video(case, "x0"),
    condition=real(case["crossattn_emb"]),
    null_condition=real(case["uncond_crossattn_emb"]),
  )


def draws(case, rules, t):
  """Returns recorded draws; steps that were not taken have no noise."""
  noise = video(case, "draw/D_eps")
  steps = 1 + len(rules["mid_times"][0])
  step_noise = [
    video(case, name) if name in case else jnp.zeros_like(noise)
    for name in (f"draw/rollout_noise_{s}" for s in range(steps))
  ]
  context_noise = np.zeros(noise.shape)
  for chunk, span in enumerate(rules["pattern"].spans(noise.shape[1])):
    if (name := f"draw/ctx_noise_chunk{chunk}") in case:
      context_noise[:, slice(*span)] = case.video(name)
  return SelfForcingDraws(
    step_noise=jnp.stack(step_noise),
    context_noise=(
      real(context_noise) if rules["context"] == "last_step" else None
    ),
    t=real(t).reshape(-1),
    noise=noise,
  )


def counters(case):
  config = case.config
  order = Alternation(
    student_every=config["student_update_freq"],
    warmup=config["tangent_warmup"],
  )
  return order.counters(config["iteration"])


@functools.cache
def compiled(objective):
  """Returns a jitted (loss per example, metrics), gradient of the sum."""

  def total(trainable, *arguments):
    loss, metrics = objective.loss(trainable, *arguments)
    return jnp.sum(loss), (loss, metrics)

  run = quick_jit(jax.value_and_grad(total, has_aux=True))

  def call(*arguments):
    (_, aux), grads = run(*arguments)
    return *aux, grads

  return call
