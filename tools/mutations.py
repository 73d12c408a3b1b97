"""Mistakes that somebody could make in the mathematics: data of `mutate.py`.

Each mutation is one edit of one file. A mistake that the tests would not see
is a test that is missing.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
  """One mistake.

  Attributes:
    why: what somebody got wrong.
    file: the file below `crcm_jax/`.
    old: the right text, which the file holds exactly once.
    new: the wrong text.
    tests: the tests that must catch it.
  """

  why: str
  file: str
  old: str
  new: str
  tests: str


# Not the golden losses and rollouts, which would catch most, slowly: a mistake
# should meet a test that says what is wrong.
ARGUMENTS = "tests/losses/test_arguments.py"
CLOSED_FORMS = "tests/losses/test_closed_forms.py"
GRADIENTS = "tests/losses/test_gradients.py"
NON_FINITE = "tests/losses/test_non_finite.py"
CHUNK_MODEL = "tests/sampling/test_chunk_model.py"
FEW_STEP = "tests/sampling/test_few_step.py"
ROLLOUT = "tests/sampling/test_rollout.py"
ROLLOUT_GRADIENTS = "tests/sampling/test_rollout_gradients.py"
SCHEDULES = "tests/sampling/test_schedules.py"
SOLVERS = "tests/sampling/test_solvers.py"
PATHS = "tests/core/test_paths.py"
GUIDANCE = "tests/core/test_guidance.py"
COUNTERS = "tests/training/test_counters.py"
SELF_FORCING = "tests/training/test_golden_self_forcing.py"


def _continuous(
  why: str, old: str, new: str, tests: str = CLOSED_FORMS
) -> Mutation:
  return Mutation(why, "losses/_continuous_consistency.py", old, new, tests)


def _discrete(
  why: str, old: str, new: str, tests: str = CLOSED_FORMS
) -> Mutation:
  return Mutation(why, "losses/_discrete_consistency.py", old, new, tests)


def _matching(
  why: str, old: str, new: str, tests: str = CLOSED_FORMS
) -> Mutation:
  return Mutation(why, "losses/_distribution_matching.py", old, new, tests)


def _flow(why: str, old: str, new: str, tests: str = CLOSED_FORMS) -> Mutation:
  return Mutation(why, "losses/_flow_matching.py", old, new, tests)


def _examples(
  why: str, old: str, new: str, tests: str = NON_FINITE
) -> Mutation:
  return Mutation(why, "losses/_examples.py", old, new, tests)


def _solvers(why: str, old: str, new: str, tests: str = SOLVERS) -> Mutation:
  return Mutation(why, "sampling/_solvers.py", old, new, tests)


def _rollout(why: str, old: str, new: str, tests: str = ROLLOUT) -> Mutation:
  return Mutation(why, "sampling/_rollout.py", old, new, tests)


_TANGENT = "g = -gap - r * expand(t - end_time, x_t) * dv"
_DIRECTION = "(expand(moves, x_t) * v_teacher, moves)"
_TRIGFLOW = "g = -cos * root * gap - (r * cos * sin * wide(x) + df)\n"

MUTATIONS = (
  # Continuous consistency and MeanFlow.
  _continuous(
    "flip the sign of the tangent term",
    _TANGENT,
    "g = -gap + r * expand(t - end_time, x_t) * dv",
  ),
  _continuous(
    "flip the sign of the gap to the teacher",
    _TANGENT,
    "g = gap - r * expand(t - end_time, x_t) * dv",
  ),
  _continuous(
    "warm up the gap instead of the tangent",
    _TANGENT,
    "g = -r * gap - expand(t - end_time, x_t) * dv",
  ),
  _continuous(
    "forget the time in front of the tangent",
    _TANGENT,
    "g = -gap - r * dv",
  ),
  _continuous(
    "forget the end time of MeanFlow",
    _TANGENT,
    "g = -gap - r * expand(t, x_t) * dv",
  ),
  _continuous(
    "divide by the square of the norm, as the paper prints",
    "normaliser = _examples.norm(g, frame_weight) + normaliser_eps",
    "normaliser = _examples.norm(g, frame_weight) ** 2 + normaliser_eps",
  ),
  _continuous(
    "normalise by the larger of norm and constant, not by their sum",
    "normaliser = _examples.norm(g, frame_weight) + normaliser_eps",
    "normaliser = jnp.maximum(_examples.norm(g, frame_weight), normaliser_eps)",
  ),
  _continuous(
    "let gradient through the tangent",
    "return v, jax.lax.stop_gradient(wide(dv))",
    "return v, wide(dv)",
  ),
  _continuous(
    "let gradient through the gap to the teacher",
    "gap = jax.lax.stop_gradient(v) - v_teacher\n  g = -gap - r *",
    "gap = v - v_teacher\n  g = -gap - r *",
  ),
  _continuous(
    "stop no gradient in the residual, which leaves none",
    "residual = v - jax.lax.stop_gradient(v) - step",
    "residual = v - v - step",
    GRADIENTS,
  ),
  _continuous(
    "let gradient into the teacher",
    'v = _examples.check_velocity(teacher(x, t), x, "teacher")\n'
    "  return jax.lax.stop_gradient(v)",
    'return _examples.check_velocity(teacher(x, t), x, "teacher")',
    GRADIENTS,
  ),
  _continuous(
    "give a removed frame a tangent",
    _DIRECTION,
    "(v_teacher, jnp.ones_like(t))",
    ARGUMENTS,
  ),
  _continuous(
    "forget the tangent of time",
    _DIRECTION,
    "(expand(moves, x_t) * v_teacher, 0 * moves)",
  ),
  _continuous(
    "move along the draw's velocity instead of the teacher's",
    _DIRECTION,
    "(expand(moves, x_t) * (noise - x_0), moves)",
  ),
  _continuous(
    "swap data and noise where MeanFlow has no teacher",
    "teacher or (lambda x, time: noise - x_0)",
    "teacher or (lambda x, time: x_0 - noise)",
  ),
  _continuous(
    "TrigFlow: warm up the tangent instead of x",
    _TRIGFLOW,
    "g = -cos * root * gap - (cos * sin * wide(x) + r * df)\n",
  ),
  _continuous(
    "TrigFlow: forget the warm-up under the root",
    "jnp.sqrt(cos**2 + (1 - r**2) * sin**2)",
    "cos",
  ),
  _continuous(
    "TrigFlow: forget sin a in the speed of the tangent",
    "speed = jnp.cos(angle) * jnp.sin(angle)",
    "speed = jnp.cos(angle)",
  ),
  _continuous(
    "TrigFlow: let gradient through the gap to the teacher",
    "gap = jax.lax.stop_gradient(f) - f_teacher",
    "gap = f - f_teacher",
  ),
  # Discrete consistency.
  _discrete(
    "step the teacher the wrong way",
    "step = expand(moves * (t - t_next), x)",
    "step = expand(moves * (t_next - t), x)",
  ),
  _discrete(
    "stop one step short of the end",
    "in itertools.pairwise(times):",
    "in itertools.pairwise(times[:-1]):",
  ),
  _discrete(
    "move a removed frame",
    "step = expand(moves * (t - t_next), x)",
    "step = expand(t - t_next, x)",
    GRADIENTS,
  ),
  _discrete(
    "take the target's prediction at the student's time",
    "target(end, times[-1])",
    "target(end, times[0])",
  ),
  _discrete(
    "let gradient into the target",
    "q = jax.lax.stop_gradient(data_prediction(end, v_end, times[-1]))",
    "q = data_prediction(end, v_end, times[-1])",
    GRADIENTS,
  ),
  _discrete(
    "sum the features of a frame instead of averaging",
    "per_frame = _examples.mean_over_features(jnp.square(gap), t[0])",
    "per_frame = jnp.square(gap).sum(axis=tuple(range(t[0].ndim, gap.ndim)))",
  ),
  _discrete(
    "TrigFlow: average instead of summing",
    "loss = _examples.weighted_sum(jnp.square(gap), frame_weight)",
    "loss = _examples.weighted_mean(jnp.square(gap), frame_weight)",
  ),
  _discrete(
    "TrigFlow: predict data as rectified flow does",
    "    paths.trigflow_data_prediction,\n",
    "    paths.data_prediction,\n",
  ),
  # Distribution matching.
  _matching(
    "swap the real and the fake score",
    "direction = time * (v_real - v_fake)",
    "direction = time * (v_fake - v_real)",
  ),
  _matching(
    "normalise by the distance from the fake prediction",
    "jnp.abs(v_real - (wide(noise)",
    "jnp.abs(v_fake - (wide(noise)",
  ),
  _matching(
    "normalise by the root mean square",
    "distance = _examples.weighted_mean(error, frame_weight)",
    "distance = jnp.sqrt(_examples.weighted_mean(error**2, frame_weight))",
  ),
  _matching(
    "forget the smallest normaliser",
    "scale = jnp.maximum(distance, SMALLEST_SCALE)",
    "scale = distance",
    GRADIENTS,
  ),
  _matching(
    "take another smallest normaliser",
    "SMALLEST_SCALE = 1e-5",
    "SMALLEST_SCALE = 1e-3",
    GRADIENTS,
  ),
  _matching(
    "let gradient through the target",
    "target = jax.lax.stop_gradient(target)\n  clean",
    "clean",
    GRADIENTS,
  ),
  _matching(
    "return a target that carries gradient",
    "return jax.lax.stop_gradient((target, metrics))",
    "return target, metrics",
    GRADIENTS,
  ),
  # Flow matching, critic, regression.
  _flow(
    "regress onto data minus noise",
    "error = v - (wide(noise) - wide(x_0))",
    "error = v - (wide(x_0) - wide(noise))",
  ),
  _flow(
    "let the critic move the samples",
    "  x_0 = jax.lax.stop_gradient(x_0)\n",
    "",
  ),
  _flow(
    "sum the critic's loss",
    'reduction: Literal["mean", "sum"] = "mean"',
    'reduction: Literal["mean", "sum"] = "sum"',
  ),
  _flow(
    "forget the bell's constant",
    "math.exp(-0.5) * jnp.expm1(2 * t * (1 - t))",
    "math.exp(-0.5) * jnp.exp(2 * t * (1 - t))",
  ),
  _flow(
    "ignore the weight of a time",
    "return _times.expand(weight, x) * x",
    "return x",
  ),
  Mutation(
    "regress the velocity instead of the data prediction",
    "losses/_regression.py",
    "error = paths.data_prediction(x_t, v, t) - wide(x_0)",
    "error = v - wide(x_0)",
    CLOSED_FORMS,
  ),
  # What all losses share.
  _examples(
    "show bad examples to the network",
    "return *zero_examples((x_0, noise, t), clean), clean",
    "return x_0, noise, t, clean",
  ),
  _examples(
    "hide what is born in the student",
    "return usable | ~finite_examples(student)",
    "return usable",
  ),
  _examples(
    "multiply a removed frame by zero, which keeps its NaN",
    "x = jnp.where(w > 0, w * x, jnp.zeros((), x.dtype))",
    "x = w * x",
    GRADIENTS,
  ),
  _examples(
    "divide a weighted mean by all frames",
    "count = weighted_sum(jnp.ones_like(x), frame_weight)",
    "count = weighted_sum(jnp.ones_like(x), None)",
    ARGUMENTS,
  ),
  # Schedules and few-step sampling.
  Mutation(
    "start at t = 1: forget 1600 / 1601",
    "sampling/_schedules.py",
    "return sigma_max / (1 + sigma_max)",
    "return 1.0",
    SCHEDULES,
  ),
  Mutation(
    "space the ODE's times from the shifted start",
    "sampling/_schedules.py",
    "np.linspace(last / (shift - (shift - 1) * last), 0.0, steps + 1)",
    "np.linspace(last, 0.0, steps + 1)",
    SCHEDULES,
  ),
  Mutation(
    "take one step too many",
    "sampling/_schedules.py",
    "0.0, steps + 1)",
    "0.0, steps + 2)",
    SCHEDULES,
  ),
  Mutation(
    "start from unscaled noise",
    "sampling/_few_step.py",
    "scale = t[0] if initial_scale is None else",
    "scale = 1.0 if initial_scale is None else",
    FEW_STEP,
  ),
  Mutation(
    "add noise of the time that was left",
    "sampling/_few_step.py",
    "(1 - t_next) * x_0 + t_next * fresh",
    "(1 - t) * x_0 + t * fresh",
    FEW_STEP,
  ),
  # Solvers.
  _solvers(
    "Euler: swap state and data prediction",
    "np.stack([ratio, 1 - ratio, np.zeros(steps)], axis=1)",
    "np.stack([1 - ratio, ratio, np.zeros(steps)], axis=1)",
  ),
  _solvers(
    "UniPC: stay of second order in the last step",
    "2 if 0 < i < steps - 1 else 1",
    "2 if 0 < i else 1",
  ),
  _solvers(
    "UniPC: forget the first correction",
    "    if i:\n",
    "    if i > 1:\n",
  ),
  _solvers(
    "UniPC: flip the sign of the second-order term",
    "return np.array([t_next / t, -signal + half, -half])",
    "return np.array([t_next / t, -signal - half, half])",
  ),
  # Rollouts.
  _rollout(
    "take one denoising step too many",
    "last = row.count - 1",
    "last = row.count",
  ),
  _rollout(
    "add the noise of the step before",
    "noise[:, :, s + 1], at(s + 1))",
    "noise[:, :, s], at(s + 1))",
  ),
  _rollout(
    "start from unscaled noise",
    "self.initial_scale * noise[:, :, 0]",
    "noise[:, :, 0]",
  ),
  _rollout(
    "leak gradient through the committed context",
    "return lax.stop_gradient((context, context_t))",
    "return context, context_t",
  ),
  _rollout(
    "commit to the cache with parameters that carry gradient",
    "_, cache = self.model.append(self.frozen, *context, cache)\n"
    "      return cache, (x_0, x, t, *context)",
    "_, cache = self.model.append(self.params, *context, cache)\n"
    "      return cache, (x_0, x, t, *context)",
    ROLLOUT_GRADIENTS,
  ),
  _rollout(
    "call a full chunk truncated",
    "truncated=counts < full",
    "truncated=counts <= full",
  ),
  _rollout(
    "commit one noisy chunk fewer",
    "(np.arange(len(sizes)) >= context_start)",
    "(np.arange(len(sizes)) > context_start)",
  ),
  _rollout(
    "commit a clean chunk at its last step's time",
    "jnp.where(row.noisy, context_t, jnp.zeros_like(last_t))",
    "context_t",
  ),
  _rollout(
    "noise a truncated chunk's context to the wrong time",
    "times[jnp.arange(len(times)), full - 1]",
    "times[jnp.arange(len(times)), counts - 1]",
  ),
  _rollout(
    "replay a chunk with its own clean frames in the cache",
    "return start + x.shape[1], x_0",
    "return start + x.shape[1] + 1, x_0",
  ),
  _rollout(
    "let the replay carry gradient into the rollout",
    "  made = lax.stop_gradient(made)\n",
    "",
    ROLLOUT_GRADIENTS,
  ),
  # Paths and guidance.
  Mutation(
    "flip the sign of the data prediction",
    "paths.py",
    "return wide(x_t) - expand(t, x_t) * wide(v)",
    "return wide(x_t) + expand(t, x_t) * wide(v)",
    PATHS,
  ),
  Mutation(
    "swap data and noise",
    "paths.py",
    "(1 - time) * wide(x_0) + time * wide(noise)",
    "time * wide(x_0) + (1 - time) * wide(noise)",
    PATHS,
  ),
  Mutation(
    "TrigFlow: add where the skip subtracts",
    "paths.py",
    "return (jnp.cos(a) - jnp.sin(a)) * x_t + wide(v) / z",
    "return (jnp.cos(a) + jnp.sin(a)) * x_t + wide(v) / z",
    PATHS,
  ),
  Mutation(
    "TrigFlow: forget to rescale the velocity",
    "paths.py",
    "* x_t + wide(v) / z",
    "* x_t + wide(v)",
    PATHS,
  ),
  Mutation(
    "swap the guidance branches",
    "guidance.py",
    "return v_u + scale * (v_c - v_u)",
    "return v_c + scale * (v_u - v_c)",
    GUIDANCE,
  ),
  Mutation(
    "guide from the conditional branch",
    "guidance.py",
    "return v_u + scale * (v_c - v_u)",
    "return v_c + scale * (v_c - v_u)",
    GUIDANCE,
  ),
  Mutation(
    "guide a rollout with the branches' caches swapped",
    "sampling/_chunk_model.py",
    "    conditional, unconditional = cache\n",
    "    unconditional, conditional = cache\n",
    CHUNK_MODEL,
  ),
  # Step counts and the replay of self-forcing, in training.
  Mutation(
    "cycle the step counts from zero",
    "training/_counters.py",
    "cycle = jnp.mod(counter, full_counts[0]) + 1",
    "cycle = jnp.mod(counter, full_counts[0])",
    COUNTERS,
  ),
  Mutation(
    "leak gradient through the context of the replay",
    "training/objectives/_self_forcing.py",
    "context_gradient=False",
    "context_gradient=True",
    SELF_FORCING,
  ),
)
