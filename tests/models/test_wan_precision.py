"""The precision policy of a bfloat16 network, island by island.

A parameter moved by less than bfloat16 resolves changes nothing where it is
cast to bfloat16, and must change something in an island.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_wan
from parity import GOLDEN
from tiny_wan import CONFIG, jit

from crcm_jax import models
from crcm_jax.models import _layers, _phases, _rope, _time
from crcm_jax.testing import golden

NARROW = dataclasses.replace(CONFIG, dtype="bfloat16")
MODEL = models.Wan(NARROW)
MISC = golden.load(GOLDEN / "misc.npz")

ISLANDS = (
  "head/modulation",
  "head/out",
  "time_embedding",
  "time_projection",
  "blocks/modulation",
  "blocks/cross_norm",
  "query_norm",
  "key_norm",
)


def held(tree):
  """Rounds to bfloat16 numbers, kept in float32."""
  narrow = lambda a: a.astype(jnp.bfloat16).astype(jnp.float32)
  return jax.tree.map(narrow, tree)


@functools.cache
def held_params():
  return held(tiny_wan.params())


@jit
def velocity(params, x, t, text):
  return MODEL.apply({"params": params}, x, t, text)


def run(params):
  return velocity(params, *tiny_wan.inputs(2)[:3])


def moved(a):
  """Moves numbers by a quarter of what bfloat16 resolves."""
  return a * (1 + 2.0**-10)


def paths_of(tree):
  named = lambda path: "/".join(key.key for key in path)
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [named(path) for path, _ in leaves]


@functools.cache
def changes():
  """Returns for each parameter whether a hidden move of it is seen."""
  params = held_params()
  leaves, structure = jax.tree.flatten(params)
  before, seen = run(params), {}
  for i, path in enumerate(paths_of(params)):
    leaf = moved(leaves[i])
    assert (held(leaf) == leaves[i]).all(), path
    after = run(structure.unflatten([*leaves[:i], leaf, *leaves[i + 1 :]]))
    seen[path] = bool((after != before).any())
  return seen


def test_islands_see_what_bfloat16_does_not_resolve():
  in_island = lambda path: any(name in path for name in ISLANDS)
  seen = changes()
  assert {path for path in seen if seen[path]} == set(filter(in_island, seen))
  for name in ISLANDS:
    assert any(name in path for path in seen), name


@pytest.mark.parametrize("row", range(6))
def test_gates_and_modulation_are_islands(row):
  """Without time features a modulation row is its parameter."""
  params = held_params()
  params = params | {
    "time_projection": jax.tree.map(jnp.zeros_like, params["time_projection"])
  }
  rows = params["blocks"]["modulation"]
  with_rows = lambda rows: (
    params | {"blocks": params["blocks"] | {"modulation": rows}}
  )
  after = run(with_rows(rows.at[:, row].set(moved(rows[:, row]))))
  assert (after != run(params)).any()


def test_the_residual_stream_keeps_small_updates():
  """Updates of 2^-12 of the stream vanish in bfloat16."""
  params = held_params()
  rows = params["blocks"]["modulation"]

  def gated(size):
    gates = rows.at[:, jnp.array([2, 5])].set(size)
    silent = jax.tree.map(jnp.zeros_like, params["time_projection"])
    cross = params["blocks"]["cross_attention"]
    cross = cross | {"out": jax.tree.map(jnp.zeros_like, cross["out"])}
    blocks = params["blocks"] | {"modulation": gates, "cross_attention": cross}
    return run(params | {"time_projection": silent, "blocks": blocks})

  small, none = gated(2.0**-12), gated(0.0)
  # Most numbers of the head change, not a few that stood at a boundary.
  assert (small != none).mean() > 0.9


def test_times_are_not_rounded():
  x, t, text, _ = tiny_wan.inputs(2)
  t = held(t)
  after = velocity(held_params(), x, moved(t), text)
  assert (after != velocity(held_params(), x, t, text)).any()


def test_norms_rotation_and_time_features_are_float32(monkeypatch):
  seen = {}

  def watch(module, name):
    function = getattr(module, name)

    @functools.wraps(function)
    def watched(x, *args, **kwargs):
      y = function(x, *args, **kwargs)
      seen.setdefault(name, set()).update({x.dtype.name, y.dtype.name})
      return y

    monkeypatch.setattr(module, name, watched)

  watch(_layers, "layer_norm")
  watch(_time, "phases")
  watch(_rope, "phases")
  rotated = []

  def rotate(x, table):
    rotated.append((x.dtype.name, table.cos.dtype.name))
    return _rope.rotate(x, table)

  monkeypatch.setattr(_layers, "rotate", rotate)
  args = (held_params(), *tiny_wan.inputs(2)[:3])
  out = jax.eval_shape(
    lambda params, *args: models.Wan(NARROW).apply({"params": params}, *args),
    *args,
  )
  assert seen == {"layer_norm": {"float32"}, "phases": {"float32"}}
  assert set(rotated) == {("float32", "float32")}
  assert out.dtype == jnp.float32


def test_the_policy_says_so():
  policy = dataclasses.replace(NARROW, param_dtype="bfloat16").precision(
    jnp.bfloat16
  )
  assert policy == models.Precision(
    params=jnp.dtype("bfloat16"),
    compute=jnp.dtype("bfloat16"),
    residual=jnp.dtype("float32"),
    island=jnp.dtype("float32"),
  )
  wide = CONFIG.precision(jnp.float64)
  assert wide.compute == wide.residual == wide.island == jnp.float64
  shapes = jax.eval_shape(
    models.Wan(dataclasses.replace(NARROW, param_dtype="bfloat16")).init,
    jax.random.key(0),
    *tiny_wan.inputs(2)[:3],
  )
  assert {a.dtype for a in jax.tree.leaves(shapes)} == {policy.params}


@pytest.mark.usefixtures("precision")
def test_rounded_times_are_the_references():
  p = _time.round_to_bfloat16(1000 * parity.real(MISC["rf_t"]))
  name = "bf16_timestep_of_rf_t"
  parity.check("misc", name, p, MISC[name])


def test_rounded_times_restore_the_original_network():
  x, _, text, _ = tiny_wan.inputs(2)
  config = dataclasses.replace(CONFIG, time_scale=1000.0)
  rounding = models.Wan(dataclasses.replace(config, bfloat16_times=True))

  @jit
  def both(t):
    params = {"params": held_params()}
    run = lambda model: lambda t: model.apply(params, x, t, text)
    v, slope = jax.jvp(run(rounding), (t,), (jnp.ones_like(t),))
    return v, run(models.Wan(config))(t), slope

  rounded, exact, slope = both(jnp.full((2, 2), 0.75))
  _, at_752, its_slope = both(jnp.full((2, 2), 0.752))
  assert tiny_wan.relative(rounded, exact) > 1e-3
  assert tiny_wan.relative(rounded, at_752) < 1e-5
  # A step function has no slope of use: the slope is the smooth network's.
  assert tiny_wan.relative(slope, its_slope) < 1e-5


@pytest.mark.parametrize("size", [1.0, 21.0, 1e3, 1e5])
def test_phases_keep_their_digits_in_float32(size):
  rng = np.random.default_rng(0)
  x = np.float32(rng.uniform(0, size, 500))
  rates = 10000.0 ** (-np.arange(64) / 64)
  got = jnp.cos(_phases.phases(jnp.asarray(x), rates))
  np.testing.assert_allclose(
    got, np.cos(np.float64(x)[:, None] * rates), atol=3e-6
  )


def test_phases_have_the_slope_of_the_product():
  rates = np.array([1.0, 1000.0, 0.37])
  x = jnp.array([0.1, 0.7])
  _, slope = jax.jvp(
    lambda x: _phases.phases(x, rates), (x,), (jnp.ones_like(x),)
  )
  np.testing.assert_allclose(slope, np.tile(rates, (2, 1)), rtol=1e-6)


def test_a_working_copy_computes_the_same():
  copy = models.working_copy(held_params(), "bfloat16")
  np.testing.assert_array_equal(run(copy), run(held_params()))
  narrow = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree.leaves_with_path(copy)
    if leaf.dtype == jnp.bfloat16
  }
  assert "blocks/ffn/up/kernel" in narrow
  assert "blocks/self_attention/query/kernel" in narrow
  assert "blocks/self_attention/query/bias" in narrow
  assert not [name for name in narrow for island in ISLANDS if island in name]
  large = sum(p.size for p in jax.tree.leaves(copy) if p.dtype == jnp.bfloat16)
  assert large > 0.5 * sum(p.size for p in jax.tree.leaves(copy))
  # float32 stands for at least float32.
  same = models.working_copy(held_params(), "float32")
  assert jax.tree.leaves(same)[0] is jax.tree.leaves(held_params())[0]
