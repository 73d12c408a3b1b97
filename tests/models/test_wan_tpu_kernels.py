"""What a Wan transformer of two scanned layers runs on a TPU, kernel by kernel.

Programs are lowered for TPUs, which needs neither a TPU nor its compiler. A
layer attends four times: two streams, clean and noisy, to video and to text.
"""

import dataclasses
import functools

import jax
import launches
import pytest
import tiny_wan

from crcm_jax import ChunkPattern, kernels, losses, models

X, T, TEXT, CLEAN = tiny_wan.inputs(3)

# Products of a visited tile, for each launch in a layer. Without tangents a
# tile of each pair costs 2. Noisy queries with tangents cost 4 over clean tiles
# and 6 over their own, and 4 over text.
FORWARD = {"forward": [2, 2, 2, 4]}
TANGENT = {"forward": [2, 2], "fused": [4, 10]}
BACKWARD = {"dq": [3, 3, 3, 6], "dkv": [4, 4, 4, 4, 4]}


def join(*launched):
  """All launches of several passes."""
  names = {name for part in launched for name in part}
  return {
    name: sorted(n for part in launched for n in part.get(name, ()))
    for name in names
  }


def network(remat):
  """The teacher-forcing velocity, `velocity(params, x, t)`."""
  attend = functools.partial(kernels.attention, implementation="pallas_tpu")
  config = dataclasses.replace(tiny_wan.CONFIG, remat=remat)
  model = models.Wan(config, attention=attend)
  options = dict(pattern=ChunkPattern(1, 1), context=CLEAN)
  return lambda params, x, t: model.apply(
    {"params": params}, x, t, TEXT, **options
  )


def tangent(velocity, params):
  return jax.jvp(functools.partial(velocity, params), (X, T), (X, T))


def gradient(velocity, params):
  return jax.grad(lambda params: (velocity(params, X, T) ** 2).sum())(params)


def consistency(velocity, params):
  """The gradient of the sCM loss, whose tangent shares its primal."""

  def loss(params):
    teacher = lambda x, t: 0.5 * x
    terms, _ = losses.continuous_consistency_loss(
      velocity, params, teacher, CLEAN, X, T
    )
    return terms.sum()

  return jax.grad(loss)(params)


@pytest.mark.parametrize(
  ("mode", "remat", "wanted"),
  [
    (tangent, None, TANGENT),
    (gradient, None, join(FORWARD, BACKWARD)),
    (gradient, "full", join(FORWARD, FORWARD, BACKWARD)),
    (gradient, "attention", join(FORWARD, BACKWARD)),
    (consistency, None, join(TANGENT, BACKWARD)),
    (consistency, "full", join(FORWARD, TANGENT, BACKWARD)),
    (consistency, "attention", join(TANGENT, BACKWARD)),
  ],
)
def test_launches_and_products(mode, remat, wanted):
  run = jax.jit(functools.partial(mode, network(remat)))
  traced = run.trace(tiny_wan.params())
  assert launches.products(traced) == wanted
  assert launches.lowered(traced, "tpu") == {
    name: len(products) for name, products in wanted.items()
  }
