"""The backend "pallas_tpu", interpreted on the CPU and lowered for TPUs.

JAX interprets TPU kernels in two ways. One, plain, runs inside any program. The
other simulates a TPU's memories: what was never written is NaN, and races are
found; it needs a program of its own, so there the passes are called directly.
"""

import dataclasses
import functools

import backend_suite
from backend_suite import arrays, call, Case, CASES, close, expected
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from crcm_jax import kernels
from crcm_jax.kernels.backend import Problem, Tangents
from crcm_jax.kernels.pallas_tpu import PallasTpu, TpuBlocks

SMALL = TpuBlocks(queries=128, keys=256, dkv_queries=128, dkv_keys=128)
PLAIN = PallasTpu(interpret=True)
CHECKED = PallasTpu(
  blocks=SMALL,
  interpret=pltpu.InterpretParams(
    uninitialized_memory="nan", detect_races=True
  ),
)
_LONG = (0, 130, 420, 600)
TILED = {  # several tiles, whole ones and boundaries, of every kind
  "noisy": Case(600, 600, 600, kernels.BlockMask.noisy_rows(_LONG)),
  "window": Case(
    600, 600, mask=kernels.BlockMask.block_causal(_LONG, window=1, sink=1)
  ),
  "cached": Case(140, 140, 800, ranges=((300, 700), (3, 17))),
}


class Suite(backend_suite.BackendSuite):
  backend = PLAIN

  def test_float64(self):
    """float64 is refused by name, for another backend to take."""
    x = [a.astype(np.float64) for a in arrays(CASES["noisy"])]
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="64"):
      call(CASES["noisy"], self.backend, *x)


@pytest.mark.slow
class TestPallasTpu(Suite):
  """All of the suite."""


@pytest.mark.slow
class TestSmallTiles(Suite):
  backend = dataclasses.replace(PLAIN, blocks=SMALL)


@pytest.mark.parametrize("name", ["noisy", "cached"])
def test_value_tangent_cotangent(name):
  """What the suite checks first, for the two cases that matter most."""
  Suite().test_value_tangent_cotangent(name)


def test_float64_is_refused():
  Suite().test_float64()


@pytest.mark.parametrize("name", TILED)
def test_many_tiles(monkeypatch, name):
  """Keys and queries of several tiles each, whole and cut by boundaries."""
  monkeypatch.setitem(CASES, "tiled", TILED[name])
  suite = TestSmallTiles()
  suite.test_value_tangent_cotangent("tiled")


def lse_of(case, x):
  """log-sum-exp of the visible scores [b n s]; -inf where nothing is seen."""
  q, k, _ = backend_suite._joined(case, x)
  s = q.shape[-1] ** -0.5 * np.einsum("bsnd,bznd->bnsz", q, k)
  with np.errstate(divide="ignore"):
    return np.log(np.where(case.visible(), np.exp(s), 0).sum(-1))


def check_passes(case, backend):
  """Checks all four passes of a case, called directly."""
  x, t = (list(map(jnp.asarray, arrays(case, i))) for i in range(2))
  do = jnp.asarray(arrays(case, 2)[0])
  live = [i for i in range(5) if x[i].shape[1]]
  order = [0, *(i for i in (3, 4) if i in live), *(i for i in (1, 2) if i in live)]
  lengths = [x[i].shape[1] for i in order[1::2]]
  ranged = bool(case.ranges)
  mask = case.mask or kernels.BlockMask.full(case.s, sum(lengths[ranged:]))
  problem = Problem(
    backend, mask, x[0].shape[-1] ** -0.5, len(lengths), ranged, True
  )
  flat = [x[i] for i in order]
  if ranged:
    flat.append(jnp.array(sorted(case.ranges), jnp.int32))
  flat.extend(backend.tables(mask, lengths[ranged:]))
  moved = [t[i] for i in order]

  @jax.jit
  def run(flat, moved, do):
    x = problem.operands(flat)
    t = Tangents(moved[0], tuple(moved[1::2]), tuple(moved[2::2]))
    o, lse = backend.forward(problem, x)
    linear = backend.linear(problem, x, o, lse, t)
    grads = backend.backward(problem, x, o, lse, do, [True] * len(order))
    return (o, lse), backend.fused(problem, x, t), linear, grads

  forward, fused, linear, grads = run(flat, moved, do)
  want_o, want_to, want_grads = expected(case, x, t, do)
  for o, lse in (forward, fused[:2]):
    close(o, want_o)
    np.testing.assert_allclose(lse, lse_of(case, x), rtol=1e-5, atol=1e-5)
  close(fused[2], want_to)
  close(linear, want_to)
  for i, grad in zip(order, grads, strict=True):
    close(grad, want_grads[i])


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("noisy", "blind") else pytest.param(name, marks=pytest.mark.slow)
    for name in CASES
  ],
)
def test_memory_and_races(name):
  """Nothing reads memory that was not written; no two writes race."""
  check_passes(CASES[name], CHECKED)


@pytest.mark.slow
@pytest.mark.parametrize("name", TILED)
def test_memory_and_races_of_many_tiles(name):
  check_passes(TILED[name], CHECKED)
