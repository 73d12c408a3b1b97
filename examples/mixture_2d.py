"""Every objective of the library on a 2-D mixture whose velocity is known.

The teacher is exact, so each student can be held against the truth: the map of
the teacher's own ODE, from noise at t = 1 to data at t = 0. Prints a table and
draws where the students send the same noise.

    python examples/mixture_2d.py --out mixture.svg   # a minute on a CPU

Everything here is plain JAX and Optax; a step of the real recipe has the same
losses with a larger network.
"""

import argparse
import functools
import itertools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from crcm_jax import losses, paths, sampling
from crcm_jax.testing import MixtureTeacher
from crcm_jax.time_sampling import LogNormal, ShiftedUniform

ANGLES = 2 * np.pi * np.arange(5) / 5
TEACHER = MixtureTeacher(
  means=1.5 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1),
  stds=np.full(5, 0.3),
)
GRID = sampling.ode_schedule(16)  # from t = 1600 / 1601 to 0
BATCH = 512
WIDTH = 128


def init(key, times=1):
  """Returns a network of `times` time inputs: a perceptron of three layers."""
  sizes = (2 + 5 * times, WIDTH, WIDTH, WIDTH, 2)
  keys = jax.random.split(key, len(sizes) - 1)
  pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
  return [
    (jax.random.normal(k, (a, b)) / np.sqrt(a), jnp.zeros(b))
    for k, a, b in pairs
  ]


def velocity(params, x, *times):
  """The network: `velocity(params, x, t)`, or with an end time for MeanFlow."""
  h = jnp.concatenate([x, *map(_features, times)], axis=1)
  for weight, bias in params[:-1]:
    h = jax.nn.silu(h @ weight + bias)
  weight, bias = params[-1]
  return h @ weight + bias


def _features(t):
  angle = np.pi * t[:, None] * np.array([1.0, 2.0])
  return jnp.concatenate([t[:, None], jnp.cos(angle), jnp.sin(angle)], axis=1)


# One function an objective: `loss(params, key, progress)`, progress in [0, 1].


def flow_matching(params, key, progress):
  """Diffusion training, from data alone."""
  del progress
  x_0, noise, t = _draw(key, ShiftedUniform(1.0))
  return losses.flow_matching_loss(velocity, params, x_0, noise, t)[0].mean()


def discrete(params, key, progress, steps=32):
  """dCM: neighbouring times, one teacher step apart."""
  del progress
  x_0, noise, u = _draw(key, ShiftedUniform(1.0))
  s = 1 - (u[:, None] * (1 - 1 / steps) + jnp.arange(2) / steps)
  return losses.discrete_consistency_loss(
    velocity, params, TEACHER.velocity, x_0, noise, paths.shift_time(s, 3.0)
  )[0].mean()


def continuous(params, key, progress):
  """sCM: one jvp, warmed up over the first tenth."""
  x_0, noise, t = _draw(key, LogNormal(0.0, 1.6))
  return losses.continuous_consistency_loss(
    velocity,
    params,
    TEACHER.velocity,
    x_0,
    noise,
    t,
    tangent_weight=jnp.minimum(1, 10 * progress),
  )[0].mean()


def mean_flow(params, key, progress):
  """MeanFlow distillation: from any time t to any earlier one."""
  key, end_key = jax.random.split(key)
  x_0, noise, t = _draw(key, LogNormal(0.0, 1.6))
  end_time = t * jax.random.uniform(end_key, t.shape)
  end_time = jnp.where(jnp.arange(BATCH) % 2 == 0, 0.0, end_time)
  return losses.mean_flow_loss(
    velocity,
    params,
    TEACHER.velocity,
    x_0,
    noise,
    t,
    end_time,
    tangent_weight=jnp.minimum(1, 10 * progress),
  )[0].mean()


def regression(params, key, progress, states):
  """ODE pairs: points of the teacher's trajectories and where they end."""
  del progress
  row_key, time_key = jax.random.split(key)
  row = jax.random.randint(row_key, (BATCH,), 0, states.shape[1])
  step = jax.random.randint(time_key, (BATCH,), 0, len(GRID) - 1)
  t = jnp.asarray(GRID, jnp.float32)[step]
  return losses.regression_loss(
    velocity, params, states[step, row], states[-1, row], t
  )[0].mean()


def trajectories(key, count=8192):
  """Returns the teacher's states at each time of the grid, data last."""
  substeps = 8

  def follow(x, ends):
    start, stop = ends
    times = jnp.linspace(start, stop, substeps + 1)
    for t, t_next in itertools.pairwise(times):
      v = TEACHER.velocity(x, jnp.full(count, t))
      x = x - (t - t_next) * v
    return x, x

  x = GRID[0] * jax.random.normal(key, (count, 2))
  grid = jnp.asarray(GRID, x.dtype)
  _, states = jax.lax.scan(follow, x, (grid[:-1], grid[1:]))
  return jnp.concatenate([x[None], states])


def _draw(key, law):
  data_key, noise_key, time_key = jax.random.split(key, 3)
  x_0 = TEACHER.sample(data_key, BATCH)
  noise = jax.random.normal(noise_key, x_0.shape)
  return x_0, noise, law.sample(time_key, (BATCH,))


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def train(loss, params, key, *data, steps, learning_rate=2e-3):
  """Minimises an objective with Adam; returns the parameters."""
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

  def update(carry, inputs):
    params, state = carry
    index, key = inputs
    grads = jax.grad(loss)(params, key, index / steps, *data)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), None

  keys = jax.random.split(key, steps)
  carry = (params, optimizer.init(params))
  (params, _), _ = jax.lax.scan(update, carry, (jnp.arange(steps), keys))
  return params


@functools.partial(jax.jit, static_argnames="steps")
def distribution_matching(student, critic, key, *, steps, critic_steps=4):
  """DMD in one step: the student and its critic, in turn."""
  student_rate = optax.cosine_decay_schedule(5e-4, steps)
  student_optimizer, critic_optimizer = map(optax.adam, (student_rate, 1e-3))
  law = ShiftedUniform(1.0)

  def sample(params, key):
    noise = jax.random.normal(key, (BATCH, 2))
    return generate(functools.partial(velocity, params), noise)

  def draws(key):
    keys = jax.random.split(key, 3)
    noise = jax.random.normal(keys[0], (BATCH, 2))
    return keys[1], noise, law.sample(keys[2], (BATCH,))

  def student_loss(params, critic, key):
    key, noise, t = draws(key)
    fake = functools.partial(velocity, critic)
    return losses.distribution_matching_loss(
      sample(params, key), noise, t, TEACHER.velocity, fake
    )[0].mean()

  def critic_loss(critic, params, key):
    key, noise, t = draws(key)
    x_0 = sample(params, key)
    return losses.critic_loss(velocity, critic, x_0, noise, t)[0].mean()

  def update_critic(carry, key):
    student, critic, state = carry
    grads = jax.grad(critic_loss)(critic, student, key)
    updates, state = critic_optimizer.update(grads, state)
    return (student, optax.apply_updates(critic, updates), state), None

  def update(carry, key):
    student, critic, state, critic_state = carry
    student_key, critic_key = jax.random.split(key)
    (_, critic, critic_state), _ = jax.lax.scan(
      update_critic,
      (student, critic, critic_state),
      jax.random.split(critic_key, critic_steps),
    )
    grads = jax.grad(student_loss)(student, critic, student_key)
    updates, state = student_optimizer.update(grads, state)
    return (
      optax.apply_updates(student, updates),
      critic,
      state,
      critic_state,
    ), None

  states = (student_optimizer.init(student), critic_optimizer.init(critic))
  carry = (student, critic, *states)
  (student, *_), _ = jax.lax.scan(update, carry, jax.random.split(key, steps))
  return student


def generate(student, noise):
  """Returns a student's samples, in one step."""
  times = sampling.few_step_schedule(sampling.MID_TIMES["1"])
  fresh = jnp.zeros((0, *noise.shape))
  return sampling.consistency_sample(student, noise, times, fresh)


def follow_ode(velocity, noise, steps=200):
  """Returns where an ODE takes the noise."""
  times = sampling.ode_schedule(steps)
  return sampling.integrate(velocity, times[0] * noise, times, solver="unipc")


class Result(NamedTuple):
  """How a student does.

  Attributes:
    samples: where it sends the common noise.
    distance: root mean square distance to where the teacher's ODE sends it.
    energy: energy distance to other samples of the ODE, 0 for equal laws.
  """

  samples: jax.Array
  distance: float
  energy: float


def run(steps=2000, seed=0, count=4096):
  """Trains every student; returns their results by name, the ODE's first."""
  key = jax.random.key(seed)
  keys = list(jax.random.split(key, 11))
  noise = jax.random.normal(keys[0], (count, 2))
  truth = jax.jit(lambda z: follow_ode(TEACHER.velocity, z))(noise)
  one, two = init(keys[1]), init(keys[10], times=2)
  states = jax.jit(trajectories)(keys[2])

  diffusion = train(flow_matching, one, keys[3], steps=steps)
  students = {
    "regression": train(regression, one, keys[4], states, steps=steps),
    "dCM": train(discrete, one, keys[5], steps=steps),
    "sCM": train(continuous, one, keys[6], steps=steps),
  }
  jump = train(mean_flow, two, keys[7], steps=steps)
  matched = distribution_matching(
    students["dCM"], diffusion, keys[8], steps=steps // 2
  )

  one_step = lambda params: generate(functools.partial(velocity, params), noise)
  samples = {"teacher's ODE": truth}
  samples["flow matching, ODE"] = follow_ode(
    functools.partial(velocity, diffusion), noise
  )
  samples["flow matching, 1 step"] = one_step(diffusion)
  samples |= {name: one_step(params) for name, params in students.items()}
  samples["MeanFlow"] = generate(
    lambda x, t: velocity(jump, x, t, jnp.zeros_like(t)), noise
  )
  samples["DMD after dCM"] = one_step(matched)
  # A second draw of the ODE: the energy distance of equal laws.
  other = follow_ode(TEACHER.velocity, jax.random.normal(keys[9], (count, 2)))
  return {name: _compare(x, truth, other) for name, x in samples.items()}


def _compare(samples, truth, other):
  square = jnp.square(samples - truth).sum(axis=1)
  return Result(
    samples, float(jnp.sqrt(square.mean())), float(_energy(samples, other))
  )


def _energy(x, y):
  """Estimates the energy distance `2 E|x - y| - E|x - x'| - E|y - y'|`."""

  def mean_distance(a, b, pairs):
    return jnp.linalg.norm(a[:, None] - b[None], axis=2).sum() / pairs

  n = len(x)
  within = mean_distance(x, x, n * (n - 1)) + mean_distance(y, y, n * (n - 1))
  return 2 * mean_distance(x, y, n * n) - within


def draw(results, *, points=700, columns=4, size=210):
  """Draws where each student sends the noise, as an SVG.

  A point's colour is the component that the teacher's ODE sends its noise to:
  a student with the ODE's map has the first panel's colours.
  """
  truth = np.asarray(results["teacher's ODE"].samples[:points])
  means = np.asarray(TEACHER.means)
  component = np.linalg.norm(truth[:, None] - means, axis=2).argmin(axis=1)
  rows = -(-len(results) // columns)
  width, height = columns * size, rows * (size + 40)
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    ' font-family="sans-serif" font-size="13" fill="#1d2430">'
    f'<rect width="{width}" height="{height}" fill="#fdfdfb"/>'
  ]
  for index, (name, result) in enumerate(results.items()):
    left, top = index % columns * size, index // columns * (size + 40)
    panel = _panel(np.asarray(result.samples[:points]), component, size)
    says = f"distance {result.distance:.2f}" if index else "the truth"
    parts.append(
      f'<g transform="translate({left} {top})">'
      f'<text x="{size / 2}" y="20" text-anchor="middle" font-weight="600">'
      f'{name}</text><text x="{size / 2}" y="{size + 32}"'
      f' text-anchor="middle" fill="#5b6675">{says}</text>'
      f'<g transform="translate(0 22)">{panel}</g></g>'
    )
  return "\n".join([*parts, "</svg>\n"])


def _panel(samples, component, size, reach=2.7):
  """Draws one scatter of points in the square from -reach to reach."""
  colours = ("#0b63b5", "#d1495b", "#2e8b57", "#c98a00", "#7a4fb5")
  xy = (np.clip(samples, -reach, reach) * [1, -1] / reach + 1) * size / 2
  dots = [
    "".join(f"M{x:.1f} {y:.1f}h0" for x, y in xy[component == c])
    for c in range(len(colours))
  ]
  return "".join(
    f'<path d="{d}" stroke="{colour}" stroke-width="3" stroke-opacity="0.7"'
    ' stroke-linecap="round"/>'
    for d, colour in zip(dots, colours, strict=True)
  )


def main():
  """Trains, prints the table, and draws if asked to."""
  parser = argparse.ArgumentParser(
    description="Trains every objective on a 2-D mixture."
  )
  parser.add_argument("--steps", type=int, default=2000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=pathlib.Path, help="an SVG file")
  options = parser.parse_args()
  results = run(options.steps, options.seed)
  print("student               distance to the ODE's map   energy distance")
  for name, result in results.items():
    print(f"{name:22s}{result.distance:26.3f}{result.energy:18.4f}")
  if options.out:
    options.out.write_text(draw(results))


if __name__ == "__main__":
  main()
