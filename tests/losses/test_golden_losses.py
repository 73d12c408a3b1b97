"""Every loss against the reference's losses and gradients, in float64.

Each objective is jitted once per video shape; cases of a shape share it. One
shape of each kind is in the fast suite, the others are marked slow.
"""

import functools

import golden_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_networks import check_case, f64, GOLDEN, network, video

from crcm_jax import guidance, losses, paths
from crcm_jax.testing import golden
from crcm_jax.time_sampling import (
  LogNormal,
  monotone_from_draws,
  ShiftedUniform,
)

jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def fast(file, *names):
  """Lists a file's cases, all but some of them marked slow."""
  return [
    pytest.param(name, marks=[] if name in names else pytest.mark.slow)
    for name in golden.cases(GOLDEN / f"{file}.npz")
  ]


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def load(file, name):
  return golden.load(GOLDEN / f"{file}.npz", name)


def per_frame(t, case):
  """Repeats one time per example, or per chunk, over the frames."""
  t, frames = f64(t), case.config["T"]
  if t.shape[1] == 1:
    return jnp.repeat(t, frames, axis=1)
  return t[:, golden_networks.pattern(case).chunk_of_frame(frames)]


def law(case):
  name, settings = case.config["p_G"]
  if name == "LogNormal":
    return LogNormal(settings["p_mean"], settings["p_std"])
  return ShiftedUniform(settings["shift"])


def texts(case):
  return f64(case["crossattn_emb"]), f64(case["uncond_crossattn_emb"])


def context(case, index):
  """Returns the k-th noisy context and its times, from the draws."""
  tau = f64(case[f"mid/ctx_time_{index}"])
  x_0 = video(case, "x0")
  noise = f"draw/ctx_noise_{index}"
  if noise in case:
    x_0 = paths.interpolate(x_0, video(case, noise), tau)
  return x_0, tau


def weight(case, t):
  bell = case.config.get("loss_weighting") == "gaussian_bell"
  return losses.gaussian_bell_weight(t) if bell else jnp.ones_like(t)


def summed(loss):
  """Differentiates the scaled sum over examples, as the reference does."""

  def total(params, *args):
    per_example, metrics = loss(params, *args)
    return 100.0 * per_example.sum(), (100.0 * per_example, metrics)

  return jax.value_and_grad(total, has_aux=True)


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


def draw_time(case, name="draw/time_raw"):
  return per_frame(law(case).from_raw(f64(case[name])), case)


@functools.partial(jit, static_argnames="pattern")
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
  check_case(case, loss, grads)


def diffusion_forcing_times(case):
  if "draw/fopp_anchor_idx" not in case:
    return draw_time(case)
  t = monotone_from_draws(
    law(case),
    jnp.asarray(case["draw/fopp_anchor_idx"]),
    law(case).from_raw(f64(case["draw/fopp_anchor_raw"])),
    f64(case["draw/fopp_exp_0"]),
    f64(case["draw/fopp_exp_1"]),
  )
  return per_frame(t, case)


@pytest.mark.parametrize("name", fast("df", "same_c1-3", "fopp_lognormal_c1-3"))
def test_diffusion_forcing(name):
  case, (_, params) = load("df", name), network("student")
  t = diffusion_forcing_times(case)
  np.testing.assert_allclose(t, case["mid/time_B_T"], rtol=1e-9)
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
  check_case(case, loss, grads)


@functools.partial(jit, static_argnames=("pattern", "guided_by"))
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


def neighbouring_times(case, shift):
  """SPEC section 6: s_k = 1 - (u + k du), shifted; `[b, f, steps + 1]`."""
  skip = case.config.get("dcm_skipping_interval_steps", 1)
  u = f64(case["draw/u_raw"]) * (1 - skip / 48)
  steps = jnp.arange(skip + 1, dtype=u.dtype)
  t = paths.shift_time(1 - (u + steps[None] / 48), shift)
  return jnp.repeat(t[:, None], case.config["T"], axis=1)


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
  np.testing.assert_allclose(
    times[:, 0].T[..., None], case["mid/t_list"], rtol=1e-12
  )
  (_, (loss, _)), grads = run_discrete(case)
  check_case(case, loss, grads)


@functools.partial(
  jit, static_argnames=("pattern", "guided_by", "tangent_pass")
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


def warmup(case):
  length = case.config["tangent_warmup"]
  progress = min(1.0, case.config["iteration"] / length) if length else 1.0
  return jnp.asarray(progress)


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
  check_case(case, loss, grads)
  np.testing.assert_array_equal(metrics.dropped, broken)
  tangent = video(case, "mid/student_v_jvp_tangent")[:, case.config["T"] :]
  norm = jnp.sqrt(jnp.square(tangent).sum((1, 2, 3, 4)))
  norm = jnp.where(jnp.array(broken), 0, norm)
  np.testing.assert_allclose(metrics.tangent_norm, norm, rtol=1e-9)


@pytest.mark.slow
def test_a_separate_tangent_pass_gives_the_same():
  case = load("tf_scm", "warm250of1000_g3_c1-1")
  (_, (loss, _)), grads = run_continuous(case, tangent_pass="separate")
  check_case(case, loss, grads)


def test_discrete_and_continuous_add_up():
  case = load("tf_scm", "dscm_c1-1")
  (_, (dcm, _)), dcm_grads = run_discrete(case)
  (_, (scm, _)), scm_grads = run_continuous(case, noise="draw/eps_1")
  np.testing.assert_allclose(dcm, case["loss_tf_dcm"], rtol=1e-9)
  np.testing.assert_allclose(scm, case["loss_tf_scm"], rtol=1e-9)
  check_case(case, dcm + scm, jax.tree.map(jnp.add, dcm_grads, scm_grads))


def bidirectional(params, text):
  model, _ = network("student")
  return lambda x, t: model.apply({"params": params}, x, t, text)


@functools.partial(jit, static_argnames=("loss", "guided_by"))
def rcm(params, teacher, x_0, noise, t, texts, settings, *, loss, guided_by):
  v_c, v_u = (bidirectional(teacher, text) for text in texts)
  frozen = guidance.classifier_free(v_c, v_u, guided_by)
  velocity = lambda p, x, t: bidirectional(p, texts[0])(x, t)
  loss = functools.partial(loss, velocity, **settings)
  return summed(loss)(params, frozen, x_0, noise, t)


RCM_LOSSES = {
  "scm": losses.trigflow_continuous_consistency_loss,
  "rf_scm": losses.continuous_consistency_loss,
  "dcm": losses.trigflow_discrete_consistency_loss,
}


@pytest.mark.parametrize(
  "name",
  fast("rcm_cm", "scm_warm250of1000_c1-3", "dcm_skip1_c1-1"),
)
def test_bidirectional_rcm(name):
  case = load("rcm_cm", name)
  kind = case.config["closures"][0]
  discrete = kind == "dcm"
  t = neighbouring_times(case, 5.0) if discrete else draw_time(case)
  (_, (loss, _)), grads = rcm(
    network("student")[1],
    network("bidirectional_teacher")[1],
    video(case, "x0"),
    video(case, "draw/eps"),
    t if kind == "rf_scm" else paths.angle_from_time(t),
    texts(case),
    {} if discrete else {"tangent_weight": warmup(case)},
    loss=RCM_LOSSES[kind],
    guided_by=case.config["teacher_guidance"],
  )
  check_case(case, loss, grads)
