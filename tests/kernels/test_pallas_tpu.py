"""The backend "pallas_tpu", interpreted on the CPU and lowered for TPUs.

JAX interprets TPU kernels in two ways. One, plain, runs inside any program. The
other simulates a TPU's memories: what was never written is NaN, and races are
found; it needs a program of its own, so there the passes are called directly.
"""

import dataclasses
import functools

import backend_suite
import jax
import jax.numpy as jnp
import launches
import numpy as np
import pytest
from backend_suite import arrays, call, Case, CASES, close, expected
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from crcm_jax import kernels
from crcm_jax.kernels import api
from crcm_jax.kernels import pallas_tpu_plan as plan
from crcm_jax.kernels.backend import Problem, Tangents
from crcm_jax.kernels.pallas_tpu import PallasTpu, TpuBlocks
from crcm_jax.kernels.pallas_tpu_layout import QueryTiles

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

  # JAX cannot interpret a kernel under `check_vma`: `test_shard_map_lowers`.
  test_shard_map_of_replicated_context = None

  @pytest.mark.parametrize("name", ["noisy", "cached"])
  def test_shard_map(self, name):
    super().test_shard_map(name, False)


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
  order = [
    0,
    *(i for i in (3, 4) if i in live),
    *(i for i in (1, 2) if i in live),
  ]
  lengths = [x[i].shape[1] for i in order[1::2]]
  ranged = bool(case.ranges)
  mask = case.mask or kernels.BlockMask.full(case.s, sum(lengths[ranged:]))
  problem = Problem(
    backend, mask, x[0].shape[-1] ** -0.5, len(lengths), ranged, True
  )
  flat = [x[i] for i in order]
  if ranged:
    flat.append(api._disjoint(jnp.array(case.ranges, jnp.int32), case.y))
  flat.extend(backend.tables(problem, problem.operands(flat)))
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
    name
    if name in ("noisy", "blind")
    else pytest.param(name, marks=pytest.mark.slow)
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


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["noisy", "cached"])
def test_shard_map_lowers(name, check_vma):
  """Shards lower for TPUs; gradients of a shared context are summed."""
  case = CASES[name]
  mesh = Mesh(np.array(jax.devices()[:1]), ("x",), (AxisType.Auto,))
  attend = jax.shard_map(
    lambda *x: call(case, PallasTpu(), *x),
    mesh=mesh,
    in_specs=(P("x"), P("x"), P("x"), P(), P()),
    out_specs=P("x"),
    check_vma=check_vma,
  )

  @jax.jit
  def run(x, t):
    gradient = jax.grad(lambda *x: (attend(*x) ** 2).sum(), range(5))
    return jax.jvp(attend, x, t), gradient(*x)

  x, t = (tuple(map(jnp.asarray, arrays(case, i))) for i in range(2))
  traced = run.trace(x, t)
  kernels_run = {"fused": 1, "forward": 1, "dq": 1, "dkv": 2}
  assert launches.lowered(traced, "tpu") == kernels_run
  sums = launches.count(traced)["psum_invariant"]
  assert sums == (2 if check_vma else 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_widths_lower(width, dtype):
  """Every width and dtype passes the checks that Mosaic makes of a kernel."""
  shape = jax.ShapeDtypeStruct((1, 100, 3, width), dtype)
  mask = kernels.BlockMask.block_causal((0, 30, 100))
  attend = functools.partial(
    kernels.attention, mask=mask, implementation="pallas_tpu"
  )
  loss = lambda *x: attend(*x).astype(jnp.float32).sum()
  traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(shape, shape, shape)
  kernels_run = {"forward": 1, "dq": 1, "dkv": 1}
  assert launches.lowered(traced, "tpu") == kernels_run


@pytest.mark.parametrize(
  ("dtype", "width", "message"),
  [
    ("float16", 64, "it computes in bfloat16 or float32, not in float16"),
    ("float32", 320, "its heads have at most 256 channels, not 320"),
  ],
)
def test_refusals(dtype, width, message):
  x = jnp.zeros((1, 4, 1, width), dtype)
  with pytest.raises(NotImplementedError, match=message):
    kernels.attention(x, x, x, implementation="pallas_tpu")


def test_a_row_without_queries_is_skipped():
  mask = kernels.BlockMask(
    (
      kernels.Row((0, 3), ((0, 2),)),
      kernels.Row((3, 3), ()),
      kernels.Row((3, 5), ((0, 5),)),
    ),
    5,
  )
  x = jax.random.normal(jax.random.key(0), (1, 5, 1, 8))
  attend = functools.partial(kernels.attention, x, x, x, mask=mask)
  close(attend(implementation=PLAIN), attend(implementation="xla"))


def test_a_list_of_tiles_that_is_too_long_is_refused():
  x = jax.ShapeDtypeStruct((1, 2**18, 1, 128), jnp.bfloat16)
  attend = functools.partial(kernels.attention, implementation="pallas_tpu")
  with pytest.raises(NotImplementedError, match="65537 pairs of tiles exceeds"):
    jax.eval_shape(attend, x, x, x)


def test_blocks_are_whole_registers():
  with pytest.raises(ValueError, match="`keys` must be a positive multiple of"):
    TpuBlocks(keys=200)


def test_a_mesh_of_tpus_selects_the_kernels():
  """Ahead-of-time compilation on a host without TPUs needs no argument."""
  x = jnp.zeros((1, 4, 1, 8))
  tpu = jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=tpu)
  with jax.sharding.use_abstract_mesh(mesh):
    (eqn,) = jax.make_jaxpr(kernels.attention)(x, x, x).eqns
  assert eqn.params["problem"].backend == PallasTpu()
  (eqn,) = jax.make_jaxpr(kernels.attention)(x, x, x).eqns
  assert eqn.params["problem"].backend == kernels.Xla()


def _covered(table, tiles, size, transposed):
  """How often the steps of a table visit each (padded query, key)."""
  seen = np.zeros((tiles.total, 64), np.float32)
  for out, _, low, high, read in table[:, :-1].T:
    query, key = (read, out) if transposed else (out, read)
    rows = slice(query * tiles.size, (query + 1) * tiles.size)
    seen[rows, key * size + low : key * size + high] += 1
  return tiles.unpad(jnp.asarray(seen)[None])[0]


@pytest.mark.parametrize("name", ["block_causal", "window", "packed", "blind"])
def test_tables_visit_what_is_visible_once(name):
  mask = CASES[name].mask
  want = mask.dense().astype(int)
  z = mask.num_keys
  tiles = QueryTiles.of(mask, 3, 1)
  for table, transposed in (
    (plan.attend_table(mask, (z,), tiles, (4,)), False),
    (plan.dkv_table(mask, (z,), 0, tiles, 4), True),
  ):
    got = _covered(table, tiles, 4, transposed)
    np.testing.assert_array_equal(got[:, :z], want)
    assert not got[:, z:].any()
    assert sorted(set(table[plan.OUT, :-1])) == list(
      range(-(-z // 4) if transposed else tiles.count)
    )


def test_a_short_prefix_is_few_steps():
  """Steps grow with the visible part of the context, not with its size."""
  mask, tiles = kernels.BlockMask.full(100, 100), QueryTiles((100,), 112)
  own = jnp.asarray(plan.attend_table(mask, (100,), tiles, (128,)))
  plan_steps = jax.jit(
    lambda ranges: plan.ranged_attend_table(own, ranges, 1, 8192, 512)[1]
  )
  steps = lambda *ranges: plan_steps(jnp.array(ranges, jnp.int32))
  assert steps((0, 0), (0, 0)) == 1
  assert steps((0, 512), (512, 512)) == 2
  assert steps((0, 8192), (8192, 8192)) == 17
  assert steps((0, 600), (7000, 7001)) == 4


def test_tiles_are_large():
  """No padding is saved at the cost of many small tiles."""
  mask = kernels.BlockMask.full(100 * 1280, 1)
  assert QueryTiles.of(mask, 2048, 16).size > 2000


def test_padding_is_little():
  """A frame of 1,560 tokens is one tile of 1,568 queries."""
  mask = kernels.BlockMask.block_causal(tuple(range(0, 7801, 1560)))
  tiles = QueryTiles.of(mask, TpuBlocks().queries, 16)
  assert (tiles.size, tiles.count) == (1568, 5)
  x = jnp.arange(7800.0).reshape(1, 7800, 1)
  assert tiles.pad(x).shape == (1, 5 * 1568, 1)
  assert (tiles.unpad(tiles.pad(x)) == x).all()
