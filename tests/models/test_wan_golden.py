"""The network and its parts against numbers of the reference."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from parity import GOLDEN, real
from quick_jit import quick_jit as jit

from crcm_jax import ChunkPattern, models
from crcm_jax.models import _layers, _patches, _rope, _time
from crcm_jax.testing import golden

COMPONENTS = golden.load(GOLDEN / "components.npz")
NETS = [
  ("net", "student", "c1-3"),
  ("net", "student", "c3-3"),
  pytest.param(("net", "student", "c1-1"), marks=pytest.mark.slow),
  ("net_mid", "mid", "c1-3"),
]

CACHED = [
  NETS[0],
  *(
    pytest.param(net, marks=pytest.mark.slow)
    for net in (("net", "student", "c3-3"), ("net", "student", "c1-1"))
  ),
  *([NETS[3]] if "CRCM_GOLDEN" in os.environ else []),  # not in tests/golden
]

pytestmark = pytest.mark.usefixtures("precision")


def named(net):
  return "-".join(net)


def network(file, prefix):
  weights = golden.load(GOLDEN / f"{file.replace('net', 'weights')}.npz")
  state = {
    key.removeprefix(f"{prefix}/"): value
    for key, value in weights.arrays.items()
    if key.startswith(f"{prefix}/")
  }
  config = models.WanConfig.from_wan(weights.config)
  dtype = jnp.result_type(float)
  return models.params_from_torch(state, config, dtype=dtype)


class Recorded:
  """One recorded network with its inputs."""

  def __init__(self, file, prefix, case):
    self.name = f"{file}/{case}"
    self.case = golden.load(GOLDEN / f"{file}.npz", case)
    config, self.params = network(file, prefix)
    self.model = models.Wan(config)
    self.pattern = ChunkPattern(
      self.case.config["first"], self.case.config["chunk"]
    )
    self.x, self.clean = self.video("x_noisy"), self.video("x_clean")
    self.text = real(self.case["crossattn_emb"])
    self.frames = self.x.shape[1]
    self.t = jnp.repeat(self.times("t_uniform"), self.frames, 1)

  def video(self, name):
    return real(self.case.video(name))

  def times(self, name):
    """Recorded times are network times, 1000 t."""
    return real(self.case[name] / 1000)

  def jvp(self, pattern=None):
    """Compiles velocity and tangent along a direction in x, t."""

    @jit
    def run(x, t, tan_t, **context):
      velocity = lambda x, t: self.model.apply(
        {"params": self.params}, x, t, self.text, pattern=pattern, **context
      )
      return jax.jvp(velocity, (x, t), (self.video("tan_x_noisy"), tan_t))

    return run

  def check(self, name, got):
    """Compares with a recorded video, the noisy half of a packed one."""
    if name in self.case:
      want = self.case.video(name)[:, -self.frames :]
      parity.check(self.name, name, got, want)


def recorded(net):
  return _recorded(net, parity.precision())


@functools.cache
def _recorded(net, precision):
  del precision
  return Recorded(*net)


@pytest.mark.parametrize("net", NETS[1:], ids=named)
def test_bidirectional(net):
  r = recorded(net)
  run = r.jvp()
  tan_t = jnp.repeat(real(r.case["tan_t"][:, :1]), r.frames, 1)
  v, tv = run(r.x, r.t, tan_t)
  r.check("bidir_uniform", v)
  r.check("jvp_bidir_v", v)
  r.check("jvp_bidir_tv", tv)
  v, _ = run(r.x, r.times("t_perframe"), tan_t)
  r.check("bidir_perframe", v)


def check_two_streams(net):
  r = recorded(net)
  run = functools.partial(r.jvp(r.pattern), context=r.clean)
  tan_t = real(r.case["tan_t"])
  v, tv = run(r.x, r.t, tan_t, context_t=jnp.zeros_like(r.t))
  assert v.dtype == tv.dtype == jnp.result_type(float)
  r.check("tf_packed", v)
  r.check("jvp_v", v)
  r.check("jvp_tv", tv)
  if "t_packed_mixed" not in r.case:
    return
  times = r.times("t_packed_mixed")
  context_t, t = times[:, : r.frames], times[:, r.frames :]
  v, tv = run(r.x, t, tan_t, context_t=context_t)
  r.check("tf_packed_mixed", v)
  r.check("jvp_mixed_v", v)
  r.check("jvp_mixed_tv", tv)


@pytest.mark.parametrize("net", NETS, ids=named)
def test_two_streams_equal_the_packed_reference(net):
  check_two_streams(net)


def test_two_streams_in_float32():
  with jax.enable_x64(False):
    check_two_streams(NETS[0])


@pytest.mark.parametrize("net", CACHED, ids=named)
def test_block_causal(net):
  r = recorded(net)
  t = r.times("t_chunk")[:, r.pattern.chunk_of_frame(r.frames)]
  run = jit(
    lambda x, t: r.model.apply(
      {"params": r.params}, x, t, r.text, pattern=r.pattern
    )
  )
  r.check("df_blockcausal", run(r.x, t))


@pytest.mark.parametrize("net", CACHED, ids=named)
def test_cached_chunks(net):
  r = recorded(net)
  chunks = models.WanChunks(
    r.model, r.text, height=r.x.shape[2], width=r.x.shape[3]
  )
  velocity, append = jit(chunks.velocity), jit(chunks.append)
  cache = chunks.init(r.params, r.x.shape[0], r.frames)
  noisy, clean = [], []
  for start, stop in r.pattern.spans(r.frames):
    t = r.t[:, start:stop]
    noisy.append(velocity(r.params, r.x[:, start:stop], t, cache))
    v, cache = append(r.params, r.clean[:, start:stop], 0 * t, cache)
    clean.append(v)
  assert int(cache.frames) == int(cache.position) == r.frames
  r.check("cached_readonly", jnp.concatenate(noisy, 1))
  r.check("cached_append", jnp.concatenate(clean, 1))
  for i in range(r.model.config.layers):
    for name, got in (("k", cache.past.keys), ("v", cache.past.values)):
      if (stored := f"kv_{name}_layer{i}") in r.case:
        want = r.case[stored]
        parity.check(r.name, stored, got[i].reshape(want.shape), want)


def check_component(name, got):
  parity.check("components", name, got, COMPONENTS[name])


@pytest.mark.parametrize("width", [32, 256])
def test_sinusoid(width):
  t = real(COMPONENTS["sinusoid_pos"] / 1000)
  check_component(f"sinusoid_{width}", _time.sinusoid(t, width, scale=1000.0))


def test_time_embedding():
  config, params = network("net", "student")
  model = models.Wan(config).bind({"params": params})
  t = real(COMPONENTS["time_embedding_in"] / 1000)
  stream = model._stream(jnp.zeros((1, t.size, 2, 2, 4)), t[None])
  check_component("time_embedding_out", stream.e[0])
  check_component("time_projection_out", stream.e_6[0])


@pytest.mark.parametrize("head_width", [12, 16, 24, 32, 64, 128])
def test_rope(head_width):
  name = f"rope_hd{head_width}"
  np.testing.assert_array_equal(
    _rope.axis_widths(head_width), COMPONENTS[f"{name}_dims_thw"]
  )
  settings = dict(first_frame=jnp.int32(4), dtype=jnp.result_type(float))
  angles = _rope.rope_angles(3, 2, 3, head_width, **settings)
  stored = f"{name}_freqs_T3_H2_W3_tstart4"
  want = COMPONENTS[stored]
  turned = want + np.remainder(angles - want + np.pi, 2 * np.pi) - np.pi
  parity.check("components", stored, turned, want)
  table = _rope.rope_table(3, 2, 3, head_width, **settings)
  x = real(COMPONENTS[f"{name}_x"])
  turned = _rope.rotate(x.reshape(len(x), 3, 6, *x.shape[2:]), table)
  check_component(f"{name}_out", turned.reshape(x.shape))


def test_norms():
  x = real(COMPONENTS["norm_x"])
  norm = _layers.RmsNorm(1e-6, x.dtype)
  scale = real(COMPONENTS["rmsnorm_w"])
  check_component("rmsnorm_out", norm.apply({"params": {"scale": scale}}, x))
  check_component("layernorm_noaffine_out", _layers.layer_norm(x, 1e-6))


def test_block_and_head():
  config, params = network("net", "student")
  attention = models.Wan(config).attention
  still = _rope.RopeTable(jnp.ones((1,) * 5), jnp.zeros((1,) * 5))

  @jit
  def run(params, x, e_6, text):
    first = jax.tree.map(lambda a: a[0], params["blocks"])
    block = _layers.Block(config).bind({"params": first})
    text = block.text_keys_values(text)
    out, _ = block(x, e_6, still, text, attention, attention)
    head = _layers.Head(config).bind({"params": params["head"]})
    return out, head(x, e_6[:, :, 0])

  # 12 frames of one token: modulation is per token.
  x = real(COMPONENTS["block0_x"])[:, :, None]
  e_6, text = real(COMPONENTS["block0_e"]), real(COMPONENTS["block0_context"])
  out, head = run(params, x, e_6, text)
  check_component("block0_out_norope_full", out[:, :, 0])
  check_component("head_out", head[:, :, 0])


def test_patches():
  """The reference's input features run channel slowest, ours fastest."""
  case = COMPONENTS
  x = real(case.video("patchify_in"))
  got = _patches.patchify(x, (1, 2, 2)).reshape(1, 12, 2, 2, 4)
  want = case["patchify_out"].reshape(1, 12, 4, 2, 2).transpose(0, 1, 3, 4, 2)
  parity.check("components", "patchify_out", got, want)
  tokens = real(case["unpatchify_in"]).reshape(1, 2, 6, 16)
  got = _patches.unpatchify(tokens, (1, 2, 2), height=4)
  want = case.video("unpatchify_out")
  parity.check("components", "unpatchify_out", got, want)
