"""The causal Wan transformer, bidirectional, block-causal, or cached.

One set of parameters serves every mode. A mode is a body that runs one layer on
its carry. Layers are scanned, or follow one another where their parameters lie
apart (`unstack_layers`).

* bidirectional, block-causal: the carry is one stream of tokens.
* teacher forcing: the carry is a tuple (clean, noisy). Clean tokens never read
  noisy ones, so the clean stream runs beside the noisy one and yields, layer
  by layer, the keys and values that the noisy stream reads as context. Under
  `jax.jvp` in (x, t) alone the clean half of the tuple keeps symbolically zero
  tangents and costs nothing.
* cached: the context is what earlier chunks left behind.

With `WanConfig(end_time=True)` the velocity is the mean one from a time t to an
earlier end time, whose embedding adds to that of t. Left out, the end is 0,
data, as in few-step sampling. What a context was committed with, keys and
values, always has the end 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from crcm_jax import kernels
from crcm_jax._typing import Array, Float, Int, Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models._cache import attend_with_cache, Cache
from crcm_jax.models._checks import check_call, check_chunk, check_end_time
from crcm_jax.models._conditioning import (
  as_conditioning,
  beside,
  Conditioning,
  Text,
)
from crcm_jax.models._config import WanConfig
from crcm_jax.models._layer_stack import layers_apart, of_layer, stacked
from crcm_jax.models._layers import (
  Block,
  Head,
  ImageEmbedding,
  KeysValues,
  Linear,
  Mlp,
  small_normal,
  xavier,
)
from crcm_jax.models._patches import patchify, unpatchify
from crcm_jax.models._remat import remat_policy
from crcm_jax.models._rope import rope_table, RopeTable
from crcm_jax.models._time import sinusoid

Latents = Float[Array, "b f h w c"]
Times = Float[Array, "b f"]


class Stream(NamedTuple):
  """The tokens of a video and the features of their times."""

  tokens: Float[Array, "b f p m"]
  e: Float[Array, "#b #f m"]
  """Time features, for the head."""
  e_6: Float[Array, "#b #f 6 m"]
  """Time features, for the six modulation rows of each block."""


class Wan(nn.Module):
  """Predicts the velocity of latent video, noise - x_0 (SPEC section 1).

  Attributes:
    config: sizes and precision.
    attention: the attention operation, `kernels.attention` or a form of it
      (sharded, say) with the same signature. If it has a method `with_cache`,
      that reads caches, in place of `attend_with_cache`.
    place: `place(name, tree)` puts arrays on their devices: the "tokens" of
      streams, the "patches" of latents, a "layer" of parameters, a "cache",
      a whole "network" of parameters before a rollout;
      `training.sharding` has one for a mesh. None leaves them.

  Example:
    >>> model = Wan(WanConfig(layers=2, width=32, heads=2, ffn_width=64,
    ...                       text_width=8, text_length=4))
    >>> x, t = jnp.ones((1, 3, 4, 4, 16)), jnp.full((1, 3), 0.5)
    >>> text = jnp.ones((1, 4, 8))
    >>> params = model.init(jax.random.key(0), x, t, text)["params"]
    >>> velocity = model.apply({"params": params}, x, t, text)
  """

  config: WanConfig
  attention: Callable[..., Array] = kernels.attention
  place: Callable[[str, Any], Any] | None = None

  def setup(self):
    """Makes the layers; the parameters of `blocks` are stacked."""
    config = self.config
    width, dtype = config.width, config.param_dtype
    mlp = functools.partial(
      Mlp, width, width, param_dtype=dtype, kernel_init=small_normal
    )
    self.patch_embedding = Linear(width, dtype, xavier)
    self.text_embedding = mlp(activation=nn.gelu)
    if config.image_width is not None:
      self.image_embedding = ImageEmbedding(config)
    self.time_embedding = mlp(activation=nn.silu)
    if config.end_time:
      self.end_embedding = _end_embedding(config)
    self.time_projection = Linear(6 * width, dtype, xavier)
    self.blocks = Block(config)
    self.head = Head(config)

  def __call__(
    self,
    x: Latents,
    t: Times,
    text: Text | Conditioning,
    *,
    pattern: ChunkPattern | None = None,
    context: Latents | None = None,
    context_t: Times | None = None,
    context_gradient: bool = True,
    end_time: Times | None = None,
  ) -> Latents:
    """Predicts the velocity of all frames.

    Without `pattern` every frame sees every frame. With it, a frame sees its
    own chunk and the chunks before it. With `context` too (teacher forcing),
    it sees its own chunk of `x` and, before it, the chunks of `context`.

    Args:
      x: latents at times `t`.
      t: one rectified-flow time a frame, in [0, 1], at least float32.
      text: embeddings of the prompt; with `Conditioning`, of an image too.
      pattern: how latent frames group into chunks.
      context: the history, clean or noisy latents.
      context_t: its times; None is 0, clean.
      context_gradient: whether gradient flows through the keys and values of
        the context. False stops it in every layer, as a cache does.
      end_time: where the jump of each frame ends, in [0, t], of a network
        with `WanConfig(end_time=True)`; None is 0.

    Returns:
      The velocity, at least float32; with an end time, the mean velocity
      (x_t - x_end) / (t - end_time) along the ODE.

    Raises:
      ValueError: if shapes do not fit each other, the config or the pattern.
      TypeError: if times are narrower than float32.
    """
    given = as_conditioning(text)
    x = beside(x, given.frames)
    context = None if context is None else beside(context, given.frames)
    check_call(self.config, x, t, given, pattern, context, context_t)
    check_end_time(self.config, end_time, x)
    rope = self._rope(x)
    prompt = self._prompt(given, x)
    noisy = self._stream(x, t, end_time)
    boundaries = pattern and self._boundaries(pattern, x)
    if context is None:
      causal = kernels.BlockMask.block_causal
      mask = None if boundaries is None else causal(boundaries)
      tokens = self._one_stream(noisy, rope, prompt, mask)
    else:
      assert boundaries is not None  # check_call saw to it
      if context_t is None:  # one time serves all frames
        context_t = jnp.zeros((1, 1), t.dtype)
      clean = self._stream(context, context_t)
      tokens = self._two_streams(
        clean, noisy, rope, prompt, boundaries, context_gradient
      )
    return self._velocity(tokens, noisy.e, x.shape[2])

  def text_keys_values(
    self, text: Text | Conditioning
  ) -> KeysValues | list[KeysValues]:
    """Computes every layer's keys and values of a prompt.

    Args:
      text: embeddings of the prompt, and of an image with `Conditioning`.

    Returns:
      Keys and values, `[layers b l n d]`, the image's after the prompt's; of
      layers that lie apart, a list of theirs.
    """
    given = as_conditioning(text)
    prompt = self._prompt(given, given.text)

    def body(block: Block, carry: None, xs: None):
      del xs
      return carry, block.text_keys_values(prompt)

    return self._over_layers(body, None)[1]

  def chunk(
    self,
    x: Latents,
    t: Times,
    cache: Cache,
    frames: Float[Array, "b f h w k"] | None = None,
    end_time: Times | None = None,
  ) -> tuple[Latents, KeysValues]:
    """Predicts the velocity of the frames that follow those of a cache.

    The chunk attends to the cached frames and to itself. Gradient flows
    through its own keys and values, never into the cached frames, which the
    scan over layers reads where they are.

    Args:
      x: the chunk's latents.
      t: their times.
      cache: the frames before it, and the prompt.
      frames: what is known of its frames (`Conditioning.frames`).
      end_time: as in `__call__`.

    Returns:
      The velocity, and the chunk's keys and values `[layers b f p n d]`.

    Raises:
      ValueError: if shapes do not fit each other, the config or the cache.
      TypeError: if times are narrower than float32.
    """
    x = beside(x, frames)
    check_chunk(self.config, x, t, cache.past.keys.shape)
    check_end_time(self.config, end_time, x)
    stream = self._stream(x, t, end_time)
    rope = self._rope(x, cache.position)
    stored = cache.frames * self.config.tokens_per_frame(*x.shape[2:4])
    ranges = jnp.stack([jnp.zeros_like(stored), stored])[None]
    past = jax.lax.stop_gradient(cache.past)
    with_cache = functools.partial(attend_with_cache, self.attention)
    with_cache = getattr(self.attention, "with_cache", with_cache)

    def body(block: Block, tokens: Array, xs: Any):
      of_layer, layer, text = xs
      attend = functools.partial(
        with_cache, past=past, of_layer=of_layer, layer=layer, ranges=ranges
      )
      return block(tokens, stream.e_6, rope, text, attend, self.attention)

    layers = jnp.arange(self.config.layers, dtype=jnp.int32)
    xs = (past, layers, cache.text)
    tokens, own = self._over_layers(body, stream.tokens, xs)
    return self._velocity(tokens, stream.e, x.shape[2]), stacked(own)

  def _prompt(self, given: Conditioning, like: Array) -> Array:
    """Embeds the prompt and, after it, the image."""
    text = self.text_embedding(self._compute(given.text, like))
    if given.image is None:
      return text
    image = self.image_embedding(self._compute(given.image, like))
    return jnp.concatenate([text, image], axis=1)

  def _one_stream(
    self,
    stream: Stream,
    rope: RopeTable,
    text: Float[Array, "b l m"],
    mask: kernels.BlockMask | None,
  ) -> Float[Array, "b f p m"]:
    attend = functools.partial(self.attention, mask=mask)

    def body(block: Block, tokens: Array, xs: None):
      del xs
      text_kv = block.text_keys_values(text)
      tokens, _ = block(
        tokens, stream.e_6, rope, text_kv, attend, self.attention
      )
      return tokens, None

    return self._over_layers(body, stream.tokens)[0]

  def _two_streams(
    self,
    clean: Stream,
    noisy: Stream,
    rope: RopeTable,
    text: Float[Array, "b l m"],
    boundaries: tuple[int, ...],
    context_gradient: bool,
  ) -> Float[Array, "b f p m"]:
    past = kernels.BlockMask.block_causal(boundaries)
    rows = kernels.BlockMask.noisy_rows(boundaries)
    attend_past = functools.partial(self.attention, mask=past)
    keep = (lambda x: x) if context_gradient else jax.lax.stop_gradient
    clean = keep(clean)

    def body(block: Block, streams: tuple[Array, Array], xs: None):
      del xs
      text_kv = block.text_keys_values(text)
      clean_block = block if context_gradient else _frozen(block)
      clean_tokens, context = clean_block(
        streams[0], clean.e_6, rope, keep(text_kv), attend_past, self.attention
      )
      attend = functools.partial(self.attention, context=context, mask=rows)
      noisy_tokens, _ = block(
        streams[1], noisy.e_6, rope, text_kv, attend, self.attention
      )
      return (clean_tokens, noisy_tokens), None

    return self._over_layers(body, (clean.tokens, noisy.tokens))[0][1]

  def _over_layers(
    self, layer: Callable[..., Any], carry: Any, xs: Any = None
  ) -> Any:
    """Runs `layer(block, carry, xs) -> (carry, ys)` over the layers.

    What belongs to each layer, `xs` and `ys`, is stacked, or a list of theirs:
    `ys` where the layers lie apart.
    """
    apart = layers_apart(self.blocks.variables.get("params", {}))

    def body(block: Block, carry: Any, xs: Any):
      if self.place is not None:
        block = _with_params(block, functools.partial(self.place, "layer"))
        carry = self.place("tokens", carry)
      return layer(block, carry, xs)

    if apart is not None:
      return self._one_by_one(body, apart, carry, xs)
    placed = self.place is not None
    policy = remat_policy(self.config.remat, placed=placed)
    if policy is not None:
      body = nn.remat(body, policy=policy, prevent_cse=False)
    layers = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.config.layers,
      check_constancy_invariants=False,
    )
    return layers(self.blocks, carry, stacked(xs))

  def _one_by_one(
    self, body: Callable[..., Any], apart: list[Params], carry: Any, xs: Any
  ) -> Any:
    all_ys = []
    for i, params in enumerate(apart):
      block = _with_params(self.blocks, lambda _, own=params: own)
      carry, ys = body(block, carry, of_layer(xs, i))
      all_ys.append(ys)
    return carry, all_ys

  def _stream(
    self,
    x: Latents,
    t: Float[Array, "#b #f"],
    end_time: Times | None = None,
  ) -> Stream:
    precision = self.config.precision(x.dtype)
    patches = patchify(self._compute(x, x), self.config.patch)
    patches = self._placed(patches, "patches", "tokens")
    tokens = self.patch_embedding(patches).astype(precision.residual)
    e = self.time_embedding(self._time_features(t, precision.island))
    if self.config.end_time:
      end = jnp.zeros_like(t) if end_time is None else end_time
      end_features = self._time_features(end, precision.island)
      e = e + self.end_embedding(end_features)
    e_6 = self.time_projection(nn.silu(e))
    return Stream(tokens, e, e_6.reshape(*t.shape, 6, -1))

  def _time_features(self, t: Array, dtype: Any) -> Array:
    config = self.config
    features = sinusoid(
      t,
      config.freq_width,
      scale=config.time_scale,
      bfloat16=config.bfloat16_times,
    )
    return features.astype(dtype)

  def _boundaries(self, pattern: ChunkPattern, x: Latents) -> tuple[int, ...]:
    tokens = self.config.tokens_per_frame(*x.shape[2:4])
    return pattern.token_boundaries(x.shape[1], tokens)

  def _rope(self, x: Latents, first_frame: int | Int[Array, ""] = 0):
    frames, height, width = x.shape[1:4]
    _, rows, columns = self.config.patch
    return rope_table(
      frames,
      height // rows,
      width // columns,
      self.config.head_width,
      first_frame=first_frame,
      dtype=self.config.precision(x.dtype).island,
    )

  def _velocity(
    self, tokens: Float[Array, "b f p m"], e: Array, height: int
  ) -> Latents:
    patches = self._placed(self.head(tokens, e), "tokens", "patches")
    return unpatchify(patches, self.config.patch, height=height)

  def _placed(self, patches: Array, *names: str) -> Array:
    """Moves patches between where latents and where tokens lie.

    On both sides of the linear layers, so that their gradients move no tokens.
    """
    if self.place is not None:
      for name in names:
        patches = self.place(name, patches)
    return patches

  def _compute(self, a: Array, like: Array) -> Array:
    return a.astype(self.config.precision(like.dtype).compute)


def add_end_time(
  params: Params, config: WanConfig, key: PRNGKeyArray
) -> tuple[WanConfig, Params]:
  """Gives a trained network a second time input, and leaves what it computes.

  Args:
    params: parameters of `Wan(config)`.
    config: its config, without `end_time`.
    key: of the new embedding, whose output layer starts at zero.

  Returns:
    The config with `end_time`, and its parameters.

  Example:
    >>> config, params = add_end_time(params, config, key)  # doctest: +SKIP
  """
  config = dataclasses.replace(config, end_time=True)
  features = jnp.zeros((1, config.freq_width), config.param_dtype)
  new = _end_embedding(config).init(key, features)["params"]
  return config, {**params, "end_embedding": new}


def _end_embedding(config: WanConfig) -> Mlp:
  """The second time's embedding; 0 at first, it changes no trained network."""
  return Mlp(
    config.width,
    config.width,
    nn.silu,
    config.param_dtype,
    small_normal,
    nn.initializers.zeros,
  )


def _frozen(block: Block) -> Block:
  """The same block on `stop_gradient` of its parameters.

  Stopping its keys and values alone would give the same gradient, but the
  clean stream would be linearised and run backward on zeros.
  """
  return _with_params(block, jax.lax.stop_gradient)


def _with_params(block: Block, change: Callable[[Params], Params]) -> Block:
  variables = {"params": change(block.variables["params"])}
  return block.clone(parent=None, name=None).bind(variables)
