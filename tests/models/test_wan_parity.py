"""The modes of one network agree, in values and in gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import launches
import pytest
import tiny_wan
from tiny_wan import CONFIG, jit, relative

from crcm_jax import ChunkPattern, kernels, models, testing
from crcm_jax.models import _rope

PATTERN, FRAMES = ChunkPattern(2, 2), 6
MODEL = models.Wan(CONFIG)


@pytest.fixture(autouse=True)
def _x64():
  with jax.enable_x64(True):
    yield


@functools.cache
def setting():
  """Parameters, inputs, and a weight of the output that makes a scalar."""
  widen = functools.partial(jax.tree.map, lambda a: a.astype(jnp.float64))
  x, t, text, clean = widen(tiny_wan.inputs(FRAMES))
  context_t = widen(tiny_wan.inputs(FRAMES, seed=2)[1])
  weight = widen(tiny_wan.inputs(FRAMES, seed=3)[0])
  return widen(tiny_wan.params()), x, t, text, clean, context_t, weight


class PackedWan(models.Wan):
  """Teacher forcing as the reference computes it, one [clean | noisy] row."""

  def packed(self, x, t, text, context, context_t):
    frames = x.shape[1]
    rope = [jnp.concatenate([a, a], 1) for a in self._rope(x)]
    stream = self._stream(
      jnp.concatenate([context, x], 1), jnp.concatenate([context_t, t], 1)
    )
    text = self.text_embedding(text)
    boundaries = self._boundaries(PATTERN, x)
    mask = kernels.BlockMask.teacher_forcing(boundaries)
    tokens = self._one_stream(stream, _rope.RopeTable(*rope), text, mask)
    return self._velocity(tokens, stream.e, x.shape[2])[:, frames:]


def packed(params, x, t, text, context, context_t):
  return PackedWan(CONFIG).apply(
    {"params": params}, x, t, text, context, context_t, method="packed"
  )


def two_streams(
  params, x, t, text, context, context_t, *, gradient=True, model=MODEL
):
  return model.apply(
    {"params": params},
    x,
    t,
    text,
    pattern=PATTERN,
    context=context,
    context_t=context_t,
    context_gradient=gradient,
  )


def cached(params, x, t, text, context, context_t):
  """Chunk by chunk: each one reads the cache, then the context is appended."""
  chunks = models.WanChunks(MODEL, text, height=x.shape[2], width=x.shape[3])

  def step(cache, chunk):
    x, t, context, context_t = chunk
    v = chunks.velocity(params, x, t, cache)
    return chunks.append(params, context, context_t, cache)[1], v

  def split(a):  # all chunks have the same length here
    a = a.reshape(a.shape[0], PATTERN.num_chunks(FRAMES), -1, *a.shape[2:])
    return jnp.moveaxis(a, 1, 0)

  cache = chunks.init(params, x.shape[0], FRAMES)
  xs = jax.tree.map(split, (x, t, context, context_t))
  v = jax.lax.scan(step, cache, xs)[1]
  return jnp.moveaxis(v, 0, 1).reshape(x.shape)


def bidirectional(params, x, t, text, context, context_t, *, model=MODEL):
  del context, context_t
  return model.apply({"params": params}, x, t, text)


@functools.cache
def value_and_grads(form, **options):
  """Compiles output and gradients in parameters, x and text."""

  @jit
  def run(params, x, t, text, context, context_t, weight):
    def loss(params, x, text):
      v = form(params, x, t, text, context, context_t, **options)
      return jnp.sum(weight * v), v

    grad = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    grads, v = grad(params, x, text)
    return v, grads

  return run


@pytest.mark.parametrize("noisy_context", [False, True])
def test_two_streams_equal_packed(noisy_context):
  *args, context_t, weight = setting()
  context_t = context_t if noisy_context else jnp.zeros_like(context_t)
  want, want_grads = value_and_grads(packed)(*args, context_t, weight)
  got, grads = value_and_grads(two_streams)(*args, context_t, weight)
  assert relative(got, want) < 1e-12
  assert relative(grads, want_grads) < 1e-11


@pytest.mark.parametrize("noisy_context", [False, True])
def test_replay_equals_chunk_by_chunk(noisy_context):
  """All chunks at once, given their history, as if each had its cache."""
  *args, context_t, weight = setting()
  context_t = context_t if noisy_context else jnp.zeros_like(context_t)
  args = (*args, context_t, weight)
  want, want_grads = value_and_grads(cached)(*args)
  replay, grads = value_and_grads(two_streams, gradient=False)(*args)
  assert relative(replay, want) < 1e-12
  assert relative(grads, want_grads) < 1e-11

  # With gradient through the history it would be another gradient.
  leaky, grads = value_and_grads(two_streams)(*args)
  assert relative(leaky, want) < 1e-12
  assert relative(grads[0], want_grads[0]) > 1e-2


def test_no_context_times_mean_clean():
  *args, context_t, weight = setting()
  zero = jnp.zeros_like(context_t)
  want, _ = value_and_grads(two_streams)(*args, zero, weight)
  assert relative(jit(two_streams)(*args, None), want) < 1e-13


def test_one_chunk_of_all_frames_is_bidirectional():
  params, x, t, text, *_ = setting()
  apply = jit(MODEL.apply, static_argnames="pattern")
  want = apply({"params": params}, x, t, text)
  whole = ChunkPattern(FRAMES, 1)
  got = apply({"params": params}, x, t, text, pattern=whole)
  assert relative(got, want) < 1e-12
  forced = apply({"params": params}, x, t, text, pattern=whole, context=2 * x)
  assert relative(forced, want) < 1e-12
  causal = apply({"params": params}, x, t, text, pattern=PATTERN)
  assert relative(causal, want) > 1e-3


@pytest.mark.parametrize("remat", sorted(models.REMAT_POLICIES))
def test_remat_changes_nothing(remat):
  form = two_streams if remat == "attention" else bidirectional
  model = models.Wan(dataclasses.replace(CONFIG, remat=remat))
  want, want_grads = value_and_grads(form)(*setting())
  got, grads = value_and_grads(form, model=model)(*setting())
  assert relative(got, want) < 1e-13
  assert relative(grads, want_grads) < 1e-12


def test_attention_policy_keeps_attention():
  """The backward pass of a layer runs no attention forward again."""

  def passes(remat):
    model = models.Wan(dataclasses.replace(CONFIG, remat=remat))
    run = value_and_grads(two_streams, model=model)
    return str(run.trace(*setting()).jaxpr).count("attention_fwd[")

  assert passes("attention") == passes(None) == 4
  assert passes("full") == 8


def test_outputs_policy_keeps_the_feed_forward_layers_outputs():
  """The backward pass runs each layer's second product no more."""

  def dots(remat):
    model = models.Wan(dataclasses.replace(CONFIG, remat=remat))
    run = value_and_grads(two_streams, model=model)
    return launches.count(run.trace(*setting()))["dot_general"]

  streams = 2
  assert dots("attention") - dots("outputs") == streams * CONFIG.layers


def test_causality():
  params, x, t, text, clean, *_ = setting()
  causal = lambda x: MODEL.apply(
    {"params": params}, x, t, text, pattern=PATTERN
  )
  testing.check_block_causal(causal, x, PATTERN)
  past = lambda context: two_streams(params, x, t, text, context, None)
  testing.check_block_causal(past, clean, PATTERN, strict=True)
