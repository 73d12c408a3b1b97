"""What the golden tests of losses share: times, texts, gradients."""

import golden_networks
import jax
import jax.numpy as jnp
import pytest
from parity import GOLDEN, real

from crcm_jax import paths
from crcm_jax.testing import golden
from crcm_jax.time_sampling import LogNormal, ShiftedUniform


def fast(file, *names):
  """Lists a file's cases, all but some of them marked slow."""
  return [
    pytest.param(name, marks=[] if name in names else pytest.mark.slow)
    for name in golden.cases(GOLDEN / f"{file}.npz")
  ]


def per_frame(t, case):
  """Repeats one time per example, or per chunk, over the frames."""
  t, frames = real(t), case.config["T"]
  if t.shape[1] == 1:
    return jnp.repeat(t, frames, axis=1)
  return t[:, golden_networks.pattern(case).chunk_of_frame(frames)]


def law(case, name="p_G"):
  """Returns the law of the student's times, or of the scores', `p_D`."""
  name, settings = case.config[name]
  if name == "LogNormal":
    return LogNormal(settings["p_mean"], settings["p_std"])
  return ShiftedUniform(settings["shift"])


def texts(case):
  return real(case["crossattn_emb"]), real(case["uncond_crossattn_emb"])


def draw_time(case, name="draw/time_raw"):
  return per_frame(law(case).from_raw(real(case[name])), case)


def neighbouring_times(case, shift):
  """SPEC section 6: s_k = 1 - (u + k du), shifted; `[b, f, steps + 1]`."""
  skip = case.config.get("dcm_skipping_interval_steps", 1)
  u = real(case["draw/u_raw"]) * (1 - skip / 48)
  steps = jnp.arange(skip + 1, dtype=u.dtype)
  t = paths.shift_time(1 - (u + steps[None] / 48), shift)
  return jnp.repeat(t[:, None], case.config["T"], axis=1)


def warmup(case):
  length = case.config["tangent_warmup"]
  progress = min(1.0, case.config["iteration"] / length) if length else 1.0
  return jnp.asarray(progress)


def summed(loss):
  """Differentiates the scaled sum over examples, as the reference does."""

  def total(params, *args):
    per_example, metrics = loss(params, *args)
    return 100.0 * per_example.sum(), (100.0 * per_example, metrics)

  return jax.value_and_grad(total, has_aux=True)
