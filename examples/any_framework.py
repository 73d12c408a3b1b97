"""The same two losses on a plain function, Flax Linen, Flax NNX and Equinox.

A loss wants `velocity(params, x, t)` and a pytree of parameters, so each
framework needs one line that says how its model is such a function. The four
models hold the same weights, and the table shows that they get the same
teacher-forcing sCM and DMD losses, and gradients of the same norm.

    python examples/any_framework.py          # seconds; Equinox is optional
"""

import functools
import importlib.util

import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx

from crcm_jax import losses, paths
from crcm_jax.testing import GaussianTeacher

BATCH, FRAMES, SIZE, WIDTH = 8, 5, 2, 16
INPUTS = 2 * SIZE + 1
REAL = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
FAKE = GaussianTeacher([0.5, -1.0], [[0.7, 0.0], [0.0, 0.2]])

# A frame of the network's input: noisy frame, mean of the clean past, time.


def inputs(x, t, history):
  """Returns what the network reads: teacher forcing sees the clean past."""
  count = jnp.maximum(jnp.arange(FRAMES), 1)[None, :, None]
  past = (jnp.cumsum(history, axis=1) - history) / count
  return jnp.concatenate([x, past, t[..., None]], axis=-1)


# Each framework: `make(weights) -> (velocity(params, x, t, history), params)`.


def plain(weights):
  """A function and its arrays."""

  def velocity(params, x, t, history):
    h = jnp.tanh(inputs(x, t, history) @ params["in"] + params["bias"])
    return h @ params["out"]

  return velocity, weights


class Linen(flax.linen.Module):
  """The network in Flax Linen."""

  @flax.linen.compact
  def __call__(self, h):
    """Returns the velocity of `inputs`."""
    h = jnp.tanh(flax.linen.Dense(WIDTH, name="in")(h))
    return flax.linen.Dense(SIZE, use_bias=False, name="out")(h)


def linen(weights):
  """`apply` with the parameters in its variables."""
  params = {
    "in": {"kernel": weights["in"], "bias": weights["bias"]},
    "out": {"kernel": weights["out"]},
  }
  velocity = lambda params, x, t, history: Linen().apply(
    {"params": params}, inputs(x, t, history)
  )
  return velocity, params


class Nnx(nnx.Module):
  """The network in Flax NNX."""

  def __init__(self, rngs):
    self.first = nnx.Linear(INPUTS, WIDTH, rngs=rngs)
    self.last = nnx.Linear(WIDTH, SIZE, use_bias=False, rngs=rngs)

  def __call__(self, h):
    """Returns the velocity of `inputs`."""
    return self.last(jnp.tanh(self.first(h)))


def flax_nnx(weights):
  """`split` outside, `merge` inside: the state is the parameters."""
  model = Nnx(nnx.Rngs(0))
  model.first.kernel = nnx.Param(weights["in"])
  model.first.bias = nnx.Param(weights["bias"])
  model.last.kernel = nnx.Param(weights["out"])
  graph, params = nnx.split(model)
  velocity = lambda params, x, t, history: nnx.merge(graph, params)(
    inputs(x, t, history)
  )
  return velocity, params


def equinox(weights):
  """`partition` outside, `combine` inside; modules see one frame at a time."""
  import equinox as eqx

  class Network(eqx.Module):
    first: eqx.nn.Linear
    last: eqx.nn.Linear

    def __call__(self, h):
      return self.last(jnp.tanh(self.first(h)))

  first, last = jax.random.split(jax.random.key(0))
  model = Network(
    eqx.nn.Linear(INPUTS, WIDTH, key=first),
    eqx.nn.Linear(WIDTH, SIZE, use_bias=False, key=last),
  )
  model = eqx.tree_at(
    lambda m: (m.first.weight, m.first.bias, m.last.weight),
    model,
    (weights["in"].T, weights["bias"], weights["out"].T),
  )
  params, static = eqx.partition(model, eqx.is_array)

  def velocity(params, x, t, history):
    network = eqx.combine(params, static)
    return jax.vmap(jax.vmap(network))(inputs(x, t, history))

  return velocity, params


FRAMEWORKS = {
  "plain": plain,
  "flax.linen": linen,
  "flax.nnx": flax_nnx,
  "equinox": equinox,
}


# The losses: nothing below knows a framework.


def draws():
  """Returns the same data, noise and times for everybody."""
  keys = jax.random.split(jax.random.key(1), 3)
  x_0 = REAL.sample(keys[0], BATCH * FRAMES).reshape(BATCH, FRAMES, SIZE)
  noise = jax.random.normal(keys[1], x_0.shape)
  return x_0, noise, jax.random.uniform(keys[2], (BATCH, FRAMES))


def consistency(velocity, params):
  """TF-sCM: the tangent of the student given the clean past."""
  x_0, noise, t = draws()
  student = functools.partial(velocity, history=x_0)
  loss, _ = losses.continuous_consistency_loss(
    student, params, REAL.velocity, x_0, noise, t
  )
  return loss.mean()


def distribution_matching(velocity, params):
  """DMD of the student's samples in one step, given the past."""
  x_0, noise, t = draws()
  start = jnp.ones((BATCH, FRAMES))
  v = velocity(params, noise, start, history=x_0)
  sample = paths.data_prediction(noise, v, start)
  loss, _ = losses.distribution_matching_loss(
    sample, jnp.flip(noise, axis=0), t, REAL.velocity, FAKE.velocity
  )
  return loss.mean()


def weights():
  """Returns the weights that all models share."""
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    "in": 0.4 * jax.random.normal(keys[0], (INPUTS, WIDTH)),
    "bias": jnp.full(WIDTH, 0.1),
    "out": 0.4 * jax.random.normal(keys[1], (WIDTH, SIZE)),
  }


def run(name):
  """Returns (value, norm of the gradient) of both losses in a framework."""
  velocity, params = FRAMEWORKS[name](weights())
  results = []
  for loss in (consistency, distribution_matching):
    of_params = jax.jit(jax.value_and_grad(functools.partial(loss, velocity)))
    value, grads = of_params(params)
    squares = [jnp.square(g).sum() for g in jax.tree.leaves(grads)]
    results.append((float(value), float(jnp.sqrt(sum(squares)))))
  return results


def main():
  """Prints the losses of each framework that is installed."""
  print("            TF-sCM loss  |gradient|    DMD loss  |gradient|")
  for name in FRAMEWORKS:
    if importlib.util.find_spec(name.split(".")[0]) or name == "plain":
      (scm, scm_norm), (dmd, dmd_norm) = run(name)
      print(f"{name:11s}{scm:12.6f}{scm_norm:12.6f}{dmd:12.5f}{dmd_norm:12.5f}")
    else:
      print(f"{name:11s} is not installed")


if __name__ == "__main__":
  main()
