"""The network and its parts against numbers of the reference."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_wan import jit, relative

from crcm_jax import ChunkPattern, models
from crcm_jax.models import _layers, _patches, _rope, _time
from crcm_jax.testing import golden

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
COMPONENTS = golden.load(GOLDEN / "components.npz")
NETS = [
  ("net", "student", "c1-3"),
  ("net", "student", "c3-3"),
  ("net_mid", "mid", "c1-3"),
]


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


def network(file, prefix, dtype):
  weights = golden.load(GOLDEN / f"{file.replace('net', 'weights')}.npz")
  state = {
    key.removeprefix(f"{prefix}/"): value
    for key, value in weights.arrays.items()
    if key.startswith(f"{prefix}/")
  }
  config = models.WanConfig.from_wan(weights.config)
  return models.params_from_torch(state, config, dtype=dtype)


class Recorded:
  """One recorded network with its inputs, in one dtype."""

  def __init__(self, file, prefix, case, dtype=np.float64):
    self.case, self.dtype = golden.load(GOLDEN / f"{file}.npz", case), dtype
    config, self.params = network(file, prefix, dtype)
    self.model = models.Wan(config)
    self.pattern = ChunkPattern(
      self.case.config["first"], self.case.config["chunk"]
    )
    self.x, self.clean = self.video("x_noisy"), self.video("x_clean")
    self.text = jnp.asarray(self.case["crossattn_emb"], dtype)
    self.frames = self.x.shape[1]
    self.t = jnp.repeat(self.times("t_uniform"), self.frames, 1)

  def video(self, name):
    return jnp.asarray(self.case.video(name), self.dtype)

  def times(self, name):
    """Recorded times are network times, 1000 t."""
    return jnp.asarray(self.case[name] / 1000, self.dtype)

  def jvp(self, pattern=None):
    """Compiles velocity and tangent along a direction in x, t."""

    @jit
    def run(x, t, tan_t, **context):
      velocity = lambda x, t: self.model.apply(
        {"params": self.params}, x, t, self.text, pattern=pattern, **context
      )
      return jax.jvp(velocity, (x, t), (self.video("tan_x_noisy"), tan_t))

    return run

  def noisy(self, name):
    return self.case.video(name)[:, self.frames :]


@functools.cache
def recorded(*args):
  return Recorded(*args)


@pytest.mark.parametrize("net", NETS[1:], ids="-".join)
def test_bidirectional(net):
  r = recorded(*net)
  run = r.jvp()
  tan_t = jnp.repeat(jnp.asarray(r.case["tan_t"][:, :1], r.dtype), r.frames, 1)
  v, tv = run(r.x, r.t, tan_t)
  assert relative(v, r.case.video("bidir_uniform")) < 1e-9
  assert relative(v, r.case.video("jvp_bidir_v")) < 1e-9
  assert relative(tv, r.case.video("jvp_bidir_tv")) < 1e-9
  v, _ = run(r.x, r.times("t_perframe"), tan_t)
  assert relative(v, r.case.video("bidir_perframe")) < 1e-9


@pytest.mark.parametrize("net", NETS, ids="-".join)
def test_two_streams_equal_the_packed_reference(net):
  r = recorded(*net)
  run = functools.partial(r.jvp(r.pattern), context=r.clean)
  tan_t = jnp.asarray(r.case["tan_t"], r.dtype)
  v, tv = run(r.x, r.t, tan_t, context_t=jnp.zeros_like(r.t))
  assert relative(v, r.noisy("tf_packed")) < 1e-9
  assert relative(v, r.noisy("jvp_v")) < 1e-9
  assert relative(tv, r.noisy("jvp_tv")) < 1e-9
  if "jvp_mixed_v" in r.case:
    times = r.times("t_packed_mixed")
    context_t, t = times[:, : r.frames], times[:, r.frames :]
    v, tv = run(r.x, t, tan_t, context_t=context_t)
    assert relative(v, r.noisy("tf_packed_mixed")) < 1e-9
    assert relative(v, r.noisy("jvp_mixed_v")) < 1e-9
    assert relative(tv, r.noisy("jvp_mixed_tv")) < 1e-9


@pytest.mark.parametrize("net", NETS[:1], ids="-".join)
def test_block_causal(net):
  r = recorded(*net)
  t = r.times("t_chunk")[:, r.pattern.chunk_of_frame(r.frames)]
  run = jit(
    lambda x, t: r.model.apply(
      {"params": r.params}, x, t, r.text, pattern=r.pattern
    )
  )
  assert relative(run(r.x, t), r.case.video("df_blockcausal")) < 1e-9


@pytest.mark.parametrize("net", NETS[:1], ids="-".join)
def test_cached_chunks(net):
  r = recorded(*net)
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
  cat = lambda parts: jnp.concatenate(parts, 1)
  assert relative(cat(noisy), r.case.video("cached_readonly")) < 1e-9
  assert relative(cat(clean), r.case.video("cached_append")) < 1e-9
  for i in range(r.model.config.layers):
    assert relative(cache.past.keys[i], r.case[f"kv_k_layer{i}"]) < 1e-9
    assert relative(cache.past.values[i], r.case[f"kv_v_layer{i}"]) < 1e-9


def test_float32():
  r = recorded("net", "student", "c1-3", np.float32)
  tan_t = jnp.asarray(r.case["tan_t"])
  v, tv = r.jvp(r.pattern)(r.x, r.t, tan_t, context=r.clean)
  assert v.dtype == tv.dtype == jnp.float32
  assert relative(v, r.noisy("tf_packed").astype(np.float32)) < 1e-4
  assert relative(tv, r.noisy("jvp_tv").astype(np.float32)) < 1e-4


@pytest.mark.parametrize("width", [32, 256])
def test_sinusoid(width):
  t = COMPONENTS["sinusoid_pos"] / 1000
  got = _time.sinusoid(jnp.asarray(t), width, scale=1000.0)
  np.testing.assert_allclose(got, COMPONENTS[f"sinusoid_{width}"], atol=1e-9)
  single = _time.sinusoid(jnp.asarray(t, jnp.float32), width, scale=1000.0)
  np.testing.assert_allclose(single, COMPONENTS[f"sinusoid_{width}"], atol=2e-4)


def test_time_embedding():
  config, params = network("net", "student", np.float64)
  model = models.Wan(config).bind({"params": params})
  t = jnp.asarray(COMPONENTS["time_embedding_in"] / 1000)
  x = jnp.zeros((1, t.size, 2, 2, 4))
  stream = model._stream(x, t[None])
  assert relative(stream.e[0], COMPONENTS["time_embedding_out"]) < 1e-9
  assert relative(stream.e_6[0], COMPONENTS["time_projection_out"]) < 1e-9


@pytest.mark.parametrize("head_width", [12, 32, 128])
def test_rope(head_width):
  name = f"rope_hd{head_width}"
  np.testing.assert_array_equal(
    _rope.axis_widths(head_width), COMPONENTS[f"{name}_dims_thw"]
  )
  angles = _rope.rope_angles(
    3, 2, 3, head_width, first_frame=jnp.int32(4), dtype=jnp.float64
  )
  want = COMPONENTS[f"{name}_freqs_T3_H2_W3_tstart4"]
  np.testing.assert_allclose(angles, want, atol=1e-9)
  table = _rope.rope_table(
    3, 2, 3, head_width, first_frame=jnp.int32(4), dtype=jnp.float64
  )
  turned = _rope.rotate(jnp.asarray(COMPONENTS[f"{name}_x"]), table)
  assert relative(turned, COMPONENTS[f"{name}_out"]) < 1e-9


def test_norms():
  x = jnp.asarray(COMPONENTS["norm_x"])
  norm = _layers.RmsNorm(1e-6, jnp.float64)
  scale = jnp.asarray(COMPONENTS["rmsnorm_w"])
  got = norm.apply({"params": {"scale": scale}}, x)
  assert relative(got, COMPONENTS["rmsnorm_out"]) < 1e-9
  got = _layers.layer_norm(x, 1e-6)
  assert relative(got, COMPONENTS["layernorm_noaffine_out"]) < 1e-9


def test_block_and_head():
  config, params = network("net", "student", np.float64)
  attention = models.Wan(config).attention
  still = _rope.RopeTable(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)))

  @jit
  def run(params, x, e_6, text):
    first = jax.tree.map(lambda a: a[0], params["blocks"])
    block = _layers.Block(config).bind({"params": first})
    text = block.text_keys_values(text)
    out, _ = block(x, e_6, still, text, attention, attention)
    head = _layers.Head(config).bind({"params": params["head"]})
    return out, head(x, e_6[:, :, 0])

  frames = lambda name: jnp.asarray(COMPONENTS[name])[:, :, None]
  x = frames("block0_x")  # 12 frames of one token: modulation is per token
  e_6, text = COMPONENTS["block0_e"], COMPONENTS["block0_context"]
  out, head = run(params, x, jnp.asarray(e_6), jnp.asarray(text))
  assert relative(out, frames("block0_out_norope_full")) < 1e-9
  assert relative(head, frames("head_out")) < 1e-9


def test_patches():
  """The reference's input features run channel slowest, ours fastest."""
  case = COMPONENTS
  x = jnp.asarray(case.video("patchify_in"))
  got = _patches.patchify(x, (1, 2, 2)).reshape(1, 12, 2, 2, 4)
  want = case["patchify_out"].reshape(1, 12, 4, 2, 2).transpose(0, 1, 3, 4, 2)
  np.testing.assert_array_equal(got, want)
  tokens = jnp.asarray(case["unpatchify_in"]).reshape(1, 2, 6, 16)
  got = _patches.unpatchify(tokens, (1, 2, 2), height=4)
  np.testing.assert_array_equal(got, case.video("unpatchify_out"))
