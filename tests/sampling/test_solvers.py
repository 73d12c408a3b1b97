"""ODE solvers against the reference's trajectories and their own order."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from golden_networks import load, network, video
from parity import GOLDEN, real
from quick_jit import quick_jit

from crcm_jax import guidance, sampling
from crcm_jax.testing import GaussianTeacher, golden

ANALYTIC = [
  name
  for name in golden.cases(GOLDEN / "samplers.npz")
  if name.startswith("analytic")
]


def analytic(x, t):
  return 0.7 * x + jnp.sin(3 * t)[:, None, None, None, None]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ANALYTIC)
def test_solvers_match_the_references_trajectories(name):
  case = load("samplers", name)
  settings = case.config
  times = sampling.ode_schedule(
    settings["n"], shift=settings["shift"], sigma_max=settings["sigma_max"]
  )
  recorded = np.append(case["timesteps"] / 1000, 0.0)
  parity.check(f"samplers/{name}", "times", times, recorded, "unipc")
  x, solver = real(case["x_init"]), name.split("_")[1]
  x = sampling.integrate(analytic, x, times, solver=solver)
  parity.check(f"samplers/{name}", "sample", x, case["traj"][-1], "unipc")


@pytest.mark.usefixtures("precision")
def test_the_bidirectional_teacher_samples_as_the_references():
  case = load("samplers", "unipc_bidirectional_cfg5_8step_c1-1")
  settings = case.config
  times = sampling.ode_schedule(
    settings["num_steps"],
    shift=float(settings["sample_timestep_shift"]),
    sigma_max=float(settings["sigma_max"]),
  )
  model, params = network("bidirectional_teacher")

  @quick_jit
  def sample(params, noise, *texts):
    def under(text):
      per_frame = lambda t: jnp.repeat(t[:, None], noise.shape[1], axis=1)
      return lambda x, t: model.apply({"params": params}, x, per_frame(t), text)

    scale = settings["bidirectional_guidance"]
    velocity = guidance.classifier_free(*map(under, texts), scale)
    return sampling.integrate(velocity, noise, times, solver="unipc")

  texts = (real(case[f"{kind}crossattn_emb"]) for kind in ("", "uncond_"))
  got = sample(params, video(case, "draw/init_noise"), *texts)
  name = "samplers/unipc_bidirectional_cfg5_8step_c1-1"
  parity.check(name, "sample", got, video(case, "out"), "unipc")


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("unipc", 2)])
def test_the_error_falls_with_the_solvers_order(solver, order):
  teacher = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
  errors, steps = [], (16, 32, 64)
  with jax.enable_x64(True):
    x = jnp.array([[0.5, 1.5], [-1.0, 0.3]])
    start, end = jnp.full((2,), 0.9), jnp.full((2,), 0.1)
    exact = teacher.flow_map(x, start, end)
    for n in steps:
      times = np.linspace(0.9, 0.1, n + 1)
      ours = sampling.integrate(teacher.velocity, x, times, solver=solver)
      errors.append(float(jnp.linalg.norm(ours - exact)))
  slopes = -np.diff(np.log(errors)) / np.log(2)
  assert slopes.min() > order - 0.15, slopes


def test_both_solvers_reach_the_data_from_the_ode_schedule():
  teacher = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
  x = jnp.array([[0.5, 1.5]])
  times = sampling.ode_schedule(60)
  start = jnp.full((1,), times[0], jnp.float32)
  exact = teacher.consistency_function(x, start)
  for solver, tolerance in (("euler", 0.05), ("unipc", 0.005)):
    ours = sampling.integrate(teacher.velocity, x, times, solver=solver)
    np.testing.assert_allclose(ours, exact, atol=tolerance)


def test_bad_times_and_solvers_are_refused():
  x, still = jnp.ones((1, 2)), lambda x, t: 0 * x
  with pytest.raises(ValueError, match="`times` must decrease"):
    sampling.integrate(still, x, np.array([0.1, 0.9]))
  with pytest.raises(ValueError, match="`times` must hold at least two"):
    sampling.integrate(still, x, np.array([0.9]))
  with pytest.raises(ValueError, match=r"`times` must hold .* in \[0, 1\]"):
    sampling.integrate(still, x, np.array([999.0, 0.0]))
  with pytest.raises(ValueError, match="must start below 1 for UniPC"):
    sampling.integrate(still, x, np.array([1.0, 0.0]), solver="unipc")


def test_an_unknown_solver_is_refused(unchecked):
  del unchecked
  x, still = jnp.ones((1, 2)), lambda x, t: 0 * x
  with pytest.raises(ValueError, match="`solver` must be"):
    sampling.integrate(still, x, np.array([0.9, 0.0]), solver="heun")
