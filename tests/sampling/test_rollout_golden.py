"""Rollouts of the Wan network against the reference's samplers."""

import jax.numpy as jnp
import parity
import pytest
from golden_networks import network, pattern, video
from parity import GOLDEN, real
from quick_jit import quick_jit

from crcm_jax import models, sampling
from crcm_jax.testing import golden

SAMPLERS = GOLDEN / "samplers.npz"
FAST = (
  "student_4step_c1-1",
  "student_sched42_noisyctx1_c1-3",
  "ode_causal_noisyctx1_cfg3_6step_c1-3",
  "infer_i2v_sched42_noisyctx0_c1-3",
)
CASES = [
  name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
  for name in golden.cases(SAMPLERS)
  if name.startswith(("student", "ode_causal", "infer"))
]


pytestmark = pytest.mark.usefixtures("precision")


def _schedules(case):
  chunks = sum(name.startswith("t_steps_chunk") for name in case.arrays)
  if not chunks:
    return [case["t_steps"].tolist()]
  return [case[f"t_steps_chunk{i}"].tolist() for i in range(chunks)]


def _is_ode(case):
  return case.config["kind"] == "teacher_ode" or case.config.get("ode", False)


def _noise(case, image):
  """Returns the start's noise and each further step's, image frames apart."""
  start = video(case, min({"init_noise", "draw/init_noise"} & {*case.arrays}))
  if _is_ode(case):
    return start[None]
  skip = 0 if image is None else image.shape[1]
  names = sorted(n for n in case.arrays if n.startswith("draw/step_noise"))
  steps = [video(case, name)[:, skip:] for name in names[:-1]]
  return jnp.stack([start, *steps])


def _model(case, name, x):
  def chunks(caption):
    return models.WanChunks(
      network(name)[0], real(case[caption]), height=x.shape[2], width=x.shape[3]
    )

  conditional = chunks("crossattn_emb")
  if not _is_ode(case):
    return conditional
  scale = case.config.get("guidance", case.config.get("causal_guidance"))
  return sampling.guided(conditional, chunks("uncond_crossattn_emb"), scale)


@pytest.mark.parametrize("name", CASES)
def test_samples_are_the_references(name):
  case = golden.load(SAMPLERS, name)
  config = case.config
  image = video(case, "image_latent") if "image_latent" in case else None
  noise = _noise(case, image)
  chunks = pattern(case).num_chunks(case.video("out").shape[1])
  schedules = _schedules(case)
  times, counts = sampling.chunk_times(schedules, chunks - (image is not None))
  noisy = config.get("context_from_last_step", False)
  context_noise = None
  if "draw/image_noise" in case:
    later = jnp.zeros(noise.shape[1:])
    context_noise = jnp.concatenate(
      [video(case, "draw/image_noise"), later], axis=1
    )

  @quick_jit
  def sample(params):
    return sampling.rollout(
      _model(case, config["net"], noise[0]),
      params,
      noise,
      pattern(case),
      times,
      counts,
      solver="euler" if _is_ode(case) else "consistency",
      context="last_step" if noisy else "clean",
      context_start=config.get("context_from_last_step_start_chunk", 0),
      context_noise=context_noise,
      prefix=image,
      initial_scale=schedules[0][0],
      differentiable=False,
    ).video

  got = sample(network(config["net"])[1])
  parity.check(f"samplers/{name}", "sample", got, case.video("out"))
