"""Sizes, presets, precision, and what bad input is told."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit, relative

from crcm_jax import ChunkPattern, kernels, models

MODEL = models.Wan(CONFIG)


@pytest.mark.parametrize(
  ("config", "count"),
  [(models.WAN_1_3B, 1_418_996_800), (models.WAN_14B, 14_288_491_584)],
  ids=["1.3B", "14B"],
)
def test_presets(config, count):
  """Shapes only: 21 frames of 60 x 104 latents, 480p for five seconds."""
  model = models.Wan(config)
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  x, t, text = struct(1, 21, 60, 104, 16), struct(1, 21), struct(1, 512, 4096)
  variables = jax.eval_shape(model.init, jax.random.key(0), x, t, text)
  shapes = [a.shape for a in jax.tree.leaves(variables)]
  assert sum(map(math.prod, shapes)) == count == config.parameter_count()
  blocks = variables["params"]["blocks"]
  assert all(a.shape[0] == config.layers for a in jax.tree.leaves(blocks))
  v = jax.eval_shape(
    lambda p, x, t, c: model.apply(
      p, x, t, c, pattern=ChunkPattern(3, 3), context=x
    ),
    variables,
    x,
    t,
    text,
  )
  assert (v.shape, v.dtype) == (x.shape, jnp.float32)


def test_initialisation():
  x, t, text, _ = tiny_wan.inputs(2)
  config = dataclasses.replace(CONFIG, width=256, layers=3)
  key = jax.random.key(0, impl="rbg")  # compiles faster
  params = jit(models.Wan(config).init)(key, x, t, text)
  params = params["params"]
  std = lambda a: float(jnp.std(a))
  query = params["blocks"]["self_attention"]["query"]
  assert std(query["kernel"]) == pytest.approx(256**-0.5, rel=0.05)
  assert not query["bias"].any()
  assert not jnp.array_equal(query["kernel"][0], query["kernel"][1])
  up = params["time_embedding"]["up"]["kernel"]
  assert std(up) == pytest.approx(0.02, rel=0.1)
  assert not params["head"]["out"]["kernel"].any()
  assert not params["head"]["out"]["bias"].any()


def test_bfloat16_computes_in_bfloat16_around_float32_islands():
  seen = []

  def attention(q, k, v, **kwargs):
    seen.append({q.dtype, k.dtype, v.dtype})
    return kernels.attention(q, k, v, **kwargs)

  config = dataclasses.replace(CONFIG, dtype="bfloat16")
  params, (x, t, text, _) = tiny_wan.params(), tiny_wan.inputs(3)
  run = lambda model, x: jit(
    lambda x: model.apply({"params": params}, x, t, text)
  )(x)
  want = run(MODEL, x)
  got = run(models.Wan(config, attention=attention), x)
  assert seen == 2 * [{jnp.dtype("bfloat16")}]
  assert got.dtype == jnp.float32
  assert 1e-5 < relative(got, want) < 0.05


def test_config_messages():
  replace = lambda **change: dataclasses.replace(CONFIG, **change)
  with pytest.raises(ValueError, match=r"`width` .* `2 \* heads`.*15 with 2"):
    replace(width=15)
  with pytest.raises(ValueError, match=r"`patch` .* one latent frame"):
    replace(patch=(2, 2, 2))
  with pytest.raises(ValueError, match=r"`freq_width` must be even"):
    replace(freq_width=7)
  with pytest.raises(ValueError, match=r"`remat` .*'dots', 'full'"):
    replace(remat="some")
  with pytest.raises(ValueError, match=r"`wan` .*'dim'.* missing"):
    models.WanConfig.from_wan({"num_layers": 2})


def call(x=None, t=None, text=None, **mode):
  good, params = tiny_wan.inputs(3), tiny_wan.params()
  args = [g if a is None else a for a, g in zip((x, t, text), good)]  # noqa: B905
  return jax.eval_shape(
    lambda *args: MODEL.apply({"params": params}, *args, **mode),
    *args,
  )


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"x": jnp.zeros((2, 3, 4, 4, 5))}, "`x` .* c = 4; got shape .*last"),
    ({"x": jnp.zeros((2, 3, 4, 5, 4))}, "`x` .*divisible.* 4 x 5. Crop"),
    ({"t": jnp.zeros((2,))}, r"`t` .* per frame, \(2, 3\); got \(2,\).*repeat"),
    ({"t": jnp.zeros((2, 1))}, r"`t` .*got \(2, 1\).*jnp.repeat"),
    ({"text": jnp.zeros((2, 3, 7))}, r"`text` .* \(2, 3, 6\).*got \(2, 3, 7\)"),
    ({"pattern": ChunkPattern(2, 2)}, "`frames` .* got 3"),
    ({"context": jnp.zeros((2, 3, 4, 4, 4))}, "`context` .* `pattern`"),
    ({"context_t": jnp.zeros((2, 3))}, "`context_t` .* with `context`"),
    (
      {
        "pattern": ChunkPattern(1, 1),
        "context": jnp.zeros((2, 2, 4, 4, 4)),
      },
      r"`context` must have the shape of `x`.*\(2, 2, 4, 4, 4\)",
    ),
  ],
)
def test_call_messages(unchecked, wrong, message):
  with pytest.raises(ValueError, match=message):
    call(**wrong)


def test_narrow_times_are_refused(unchecked):
  with pytest.raises(TypeError, match=r"`t` must be float32.*bfloat16. Keep"):
    call(t=jnp.zeros((2, 3), jnp.bfloat16))
