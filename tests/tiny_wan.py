"""A Wan transformer small enough for every test, with nothing at zero."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax import models

# Compiling is what these tests spend their time on.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

CONFIG = models.WanConfig(
  layers=2,
  width=16,
  heads=2,
  ffn_width=24,
  freq_width=16,
  text_width=6,
  text_length=3,
  in_channels=4,
  out_channels=4,
  time_scale=10.0,  # 1000 makes derivatives in t dwarf everything else
)


@functools.cache
def params(config=CONFIG, seed=0):
  """Random parameters, none of them zero; made by NumPy, nothing compiles."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(centre + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

  model, args = models.Wan(config), inputs(1, config=config)[:3]
  shapes = jax.eval_shape(model.init, jax.random.key(0), *args)["params"]
  return jax.tree_util.tree_map_with_path(draw, shapes)


def inputs(frames, *, batch=2, height=4, width=4, config=CONFIG, seed=1):
  """Returns x, t, text, and a clean video, in the config's sizes."""
  keys = jax.random.split(jax.random.key(seed), 4)
  video = (batch, frames, height, width, config.in_channels)
  text = (batch, config.text_length, config.text_width)
  return (
    jax.random.normal(keys[0], video),
    jax.random.uniform(keys[1], (batch, frames)),
    jax.random.normal(keys[2], text),
    jax.random.normal(keys[3], video),
  )


def relative(got, want):
  """Relative distance of two pytrees in the 2-norm."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  flat = lambda tree: jnp.concatenate([jnp.ravel(a) for a in tree])
  error = jnp.linalg.norm(flat(got) - flat(want))
  return float(error / jnp.linalg.norm(flat(want)))
