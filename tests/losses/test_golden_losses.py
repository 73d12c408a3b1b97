"""Every loss against the reference's losses and gradients.

Each objective is jitted once per video shape; cases of a shape share it. One
shape of each kind, in float64, is in the fast suite; the others are marked
slow.
"""

import functools

import golden_networks
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

from crcm_jax import guidance, losses, paths
from crcm_jax.time_sampling import monotone_from_draws

pytestmark = pytest.mark.usefixtures("precision")


def context(case, index):
  """Returns the k-th noisy context and its times, from the draws."""
  tau = real(case[f"mid/ctx_time_{index}"])
  x_0 = video(case, "x0")
  noise = f"draw/ctx_noise_{index}"
  if noise in case:
    x_0 = paths.interpolate(x_0, video(case, noise), tau)
  return x_0, tau


def weight(case, t):
  bell = case.config.get("loss_weighting") == "gaussian_bell"
  return losses.gaussian_bell_weight(t) if bell else jnp.ones_like(t)


def causal(params, text, pattern, ctx=None, ctx_t=None):
  """Returns a causal velocity function, without context if none is given."""
  model, _ = network("student")
  return lambda x, t: model.apply(
    {"params": params},
    x,
    t,
    text,
    pattern=pattern,
    context=ctx,
    context_t=ctx_t,
  )


def guided(params, texts, pattern, x_0, scale):
  v_c, v_u = (causal(params, text, pattern, x_0) for text in texts)
  return guidance.classifier_free(v_c, v_u, scale)


@functools.partial(quick_jit, static_argnames="pattern")
def flow_matching(params, x_0, noise, t, weight, text, ctx, *, pattern):
  velocity = lambda p, x, t: causal(p, text, pattern, *ctx)(x, t)
  loss = functools.partial(losses.flow_matching_loss, velocity, weight=weight)
  return summed(loss)(params, x_0, noise, t)


@pytest.mark.parametrize("name", fast("tf", "bell_c1-3", "bell_noisyctx1_c1-3"))
def test_teacher_forcing(name):
  case, (_, params) = load("tf", name), network("student")
  t = draw_time(case)
  (_, (loss, _)), grads = flow_matching(
    params,
    video(case, "x0"),
    video(case, "draw/eps"),
    t,
    weight(case, t),
    texts(case)[0],
    context(case, 0),
    pattern=golden_networks.pattern(case),
  )
  check_case("tf", case, loss, grads)


def diffusion_forcing_times(case):
  if "draw/fopp_anchor_idx" not in case:
    return draw_time(case)
  t = monotone_from_draws(
    law(case),
    jnp.asarray(case["draw/fopp_anchor_idx"]),
    law(case).from_raw(real(case["draw/fopp_anchor_raw"])),
    real(case["draw/fopp_exp_0"]),
    real(case["draw/fopp_exp_1"]),
  )
  return per_frame(t, case)


@pytest.mark.parametrize("name", fast("df", "same_c1-3", "fopp_lognormal_c1-3"))
def test_diffusion_forcing(name):
  case, (_, params) = load("df", name), network("student")
  t = diffusion_forcing_times(case)
  parity.check(f"df/{name}", "times", t, case["mid/time_B_T"])
  (_, (loss, _)), grads = flow_matching(
    params,
    video(case, "x0"),
    video(case, "draw/eps"),
    t,
    weight(case, t),
    texts(case)[0],
    (),
    pattern=golden_networks.pattern(case),
  )
  check_case("df", case, loss, grads)


@functools.partial(quick_jit, static_argnames=("pattern", "guided_by"))
def discrete(
  params, teacher, x_0, noise, times, texts, ctx, ctx_end, *, pattern, guided_by
):
  student = lambda p, ctx: causal(p, texts[0], pattern, *ctx)
  loss = lambda p, *args: losses.discrete_consistency_loss(
    lambda q, x, t: student(q, ctx)(x, t),
    p,
    guided(teacher, texts, pattern, x_0, guided_by),
    *args,
    target=student(jax.lax.stop_gradient(p), ctx_end),
  )
  return summed(loss)(params, x_0, noise, times)


def run_discrete(case):
  return discrete(
    network("student")[1],
    network("causal_teacher")[1],
    video(case, "x0"),
    video(case, "draw/eps"),
    neighbouring_times(case, 3.0),
    texts(case),
    context(case, 0),
    context(case, 1),
    pattern=golden_networks.pattern(case),
    guided_by=case.config["causal_guidance"],
  )


@pytest.mark.parametrize(
  "name",
  fast(
    "tf_dcm",
    "skip1_g3_c1-1",
    "skip1_g3_noisyctx1_c1-1",
  ),
)
def test_discrete_consistency(name):
  case = load("tf_dcm", name)
  times = neighbouring_times(case, 3.0)
  recorded = case["mid/t_list"][..., 0].T
  parity.check(f"tf_dcm/{name}", "times", times[:, 0], recorded)
  (_, (loss, _)), grads = run_discrete(case)
  check_case("tf_dcm", case, loss, grads)


@functools.partial(
  quick_jit, static_argnames=("pattern", "guided_by", "tangent_pass")
)
def continuous(
  params,
  teacher,
  x_0,
  noise,
  t,
  texts,
  ctx,
  warmup,
  broken,
  *,
  pattern,
  guided_by,
  tangent_pass="shared",
):
  def velocity(p, x, t):
    v = causal(p, texts[0], pattern, *ctx)(x, t)
    hidden = jnp.sqrt(0 * jnp.square(x))  # zero, with a tangent of NaN
    return v + jnp.where(broken[:, None, None, None, None], hidden, 0)

  loss = functools.partial(
    losses.continuous_consistency_loss,
    velocity,
    tangent_weight=warmup,
    tangent_pass=tangent_pass,
  )
  frozen = guided(teacher, texts, pattern, x_0, guided_by)
  return summed(loss)(params, frozen, x_0, noise, t)


def run_continuous(case, noise="draw/eps", broken=(False, False), **settings):
  ctx = context(case, 0) if "draw/eps_1" not in case else context(case, 2)
  return continuous(
    network("student")[1],
    network("causal_teacher")[1],
    video(case, "x0"),
    video(case, noise),
    draw_time(case),
    texts(case),
    ctx,
    warmup(case),
    jnp.array(broken),
    pattern=golden_networks.pattern(case),
    guided_by=case.config["causal_guidance"],
    **settings,
  )


@pytest.mark.parametrize(
  "name",
  fast(
    "tf_scm",
    "warm0_g3_c1-1",
    "warm250of1000_g3_c1-1",
    "nan_in_jvp_sample1_c1-1",
  ),
)
def test_continuous_consistency(name):
  case = load("tf_scm", name)
  if "loss_tf_dcm" in case:
    pytest.skip("two losses: see the test below")
  broken = (False, "nan" in name)
  (_, (loss, metrics)), grads = run_continuous(case, broken=broken)
  check_case("tf_scm", case, loss, grads)
  np.testing.assert_array_equal(metrics.dropped, broken)
  tangent = video(case, "mid/student_v_jvp_tangent")[:, case.config["T"] :]
  norm = jnp.sqrt(jnp.square(tangent).sum((1, 2, 3, 4)))
  norm = jnp.where(jnp.array(broken), 0, norm)
  parity.check_each(
    f"tf_scm/{name}", "tangent norm", metrics.tangent_norm, norm
  )


@pytest.mark.slow
def test_a_separate_tangent_pass_gives_the_same():
  case = load("tf_scm", "warm250of1000_g3_c1-1")
  (_, (loss, _)), grads = run_continuous(case, tangent_pass="separate")
  check_case("tf_scm", case, loss, grads)


def test_discrete_and_continuous_add_up():
  case = load("tf_scm", "dscm_c1-1")
  (_, (dcm, _)), dcm_grads = run_discrete(case)
  (_, (scm, _)), scm_grads = run_continuous(case, noise="draw/eps_1")
  for part, loss in (("dcm", dcm), ("scm", scm)):
    recorded = case[f"loss_tf_{part}"]
    parity.check_each("tf_scm/dscm_c1-1", f"loss {part}", loss, recorded)
  grads = jax.tree.map(jnp.add, dcm_grads, scm_grads)
  check_case("tf_scm", case, dcm + scm, grads)
