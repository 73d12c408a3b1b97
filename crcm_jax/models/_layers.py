"""The parts of a Wan transformer (SPEC section 1).

Every layer computes in the dtype of its input, with its parameters cast to
it; where precision changes, a cast is written out (see `Precision`). Tokens
keep their frame as an axis, `[b f p m]` with p tokens a frame and m the width,
so that modulation is one row a frame, `[b f 1 m]`, and that each device can
hold a part of every frame.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from crcm_jax._typing import Array, Float
from crcm_jax.kernels._compat import row_major
from crcm_jax.models._config import WanConfig
from crcm_jax.models._layer_stack import JOINED
from crcm_jax.models._remat import FEED_FORWARD
from crcm_jax.models._rope import RopeTable, rotate

Tokens: TypeAlias = Float[Array, "b f p m"]
Heads: TypeAlias = Float[Array, "b *s n d"]
Attend: TypeAlias = Callable[[Array, Array, Array], Array]
"""`attend(q, k, v) -> o`, with mask and context closed over."""


class KeysValues(NamedTuple):
  """Keys, normalised and rotated, and values of one attention layer."""

  keys: Heads
  values: Heads


small_normal = nn.initializers.normal(0.02)
xavier = nn.initializers.xavier_uniform()


def width_normal(width: int) -> nn.initializers.Initializer:
  """Truncated normal of standard deviation 1 / sqrt(width)."""
  return nn.initializers.truncated_normal(width**-0.5, lower=-3.0, upper=3.0)


def layer_norm(x: Float[Array, "*b m"], eps: float) -> Float[Array, "*b m"]:
  """LN(x): zero mean and unit variance over the width, no parameters."""
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _last_axes(a: Float[Array, "*m"], like: Array) -> Array:
  return a.astype(like.dtype).reshape((1,) * (like.ndim - a.ndim) + a.shape)


class Linear(nn.Module):
  """y = x W + b."""

  features: int
  param_dtype: Any
  kernel_init: nn.initializers.Initializer = xavier

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Applies the layer in the dtype of `x`."""
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    bias = self.param(
      "bias", nn.initializers.zeros, (self.features,), self.param_dtype
    )
    # Rows, in gradients too. XLA may prefer columns, for a gradient's sum over
    # tokens, and then needs slow kernels where 8 does not divide the tokens.
    return row_major(x @ kernel.astype(x.dtype) + _last_axes(bias, x))


class Mlp(nn.Module):
  """Linear, activation, Linear."""

  hidden: int
  features: int
  activation: Callable[[Array], Array]
  param_dtype: Any
  kernel_init: nn.initializers.Initializer = xavier
  out_init: nn.initializers.Initializer | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Applies the layers in the dtype of `x`."""
    out_init = self.out_init or self.kernel_init
    up = Linear(self.hidden, self.param_dtype, self.kernel_init, name="up")
    down = Linear(self.features, self.param_dtype, out_init, name="down")
    return down(self.activation(up(x)))


class RmsNorm(nn.Module):
  """x / sqrt(mean(x^2) + eps) * scale, over the full width of all heads."""

  eps: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """Applies the norm in the dtype of `x`."""
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
    return x * _last_axes(scale, x)


class AffineLayerNorm(nn.Module):
  """LN(x) * scale + bias."""

  eps: float
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """Applies the norm in the dtype of `x`."""
    m = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, m, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, m, self.param_dtype)
    return layer_norm(x, self.eps) * _last_axes(scale, x) + _last_axes(bias, x)


class Attention(nn.Module):
  """The projections around an attention operation, own or cross."""

  config: WanConfig

  def setup(self):
    """Makes the four projections and the two norms."""
    config = self.config
    linear = lambda: Linear(
      config.width, config.param_dtype, width_normal(config.width)
    )
    self.query, self.key, self.value, self.out = (linear() for _ in range(4))
    self.query_norm = RmsNorm(config.eps, config.param_dtype)
    self.key_norm = RmsNorm(config.eps, config.param_dtype)

  def queries(self, x: Tokens, rope: RopeTable | None = None) -> Heads:
    """Projects tokens to normalised, rotated queries."""
    return self._normed(self.query(x), self.query_norm, rope)

  def keys_values(
    self, x: Float[Array, "b *s m"], rope: RopeTable | None = None
  ) -> KeysValues:
    """Projects tokens to normalised, rotated keys and to values."""
    keys = self._normed(self.key(x), self.key_norm, rope)
    return KeysValues(keys, self._heads(self.value(x)))

  def queries_keys_values(
    self, x: Tokens, rope: RopeTable
  ) -> tuple[Heads, KeysValues]:
    """Projects the same tokens to both, by one product if that is joined."""
    joined = self.variables.get("params", {}).get(JOINED)
    if joined is None:
      return self.queries(x, rope), self.keys_values(x, rope)
    y = jnp.einsum("bfpm,mio->bfpio", x, joined["kernel"].astype(x.dtype))
    q, k, v = (
      y[..., i, :] + _last_axes(joined["bias"][i], x) for i in range(3)
    )
    own = KeysValues(self._normed(k, self.key_norm, rope), self._heads(v))
    # XLA would rotate queries and keys at once. Apart, and on several devices,
    # the keys are on their way while the queries are rotated.
    rope = jax.lax.optimization_barrier(rope)
    return self._normed(q, self.query_norm, rope), own

  def output(self, o: Heads, like: Tokens) -> Tokens:
    """Merges the heads and projects them back to tokens shaped as `like`."""
    return self.out(o.reshape(like.shape))

  def _heads(self, x: Float[Array, "b *s m"]) -> Heads:
    return x.reshape(*x.shape[:-1], self.config.heads, self.config.head_width)

  def _normed(self, x: Array, norm: RmsNorm, rope: RopeTable | None) -> Heads:
    island = self.config.precision(x.dtype).island
    heads = self._heads(norm(x.astype(island)))
    return (heads if rope is None else rotate(heads, rope)).astype(x.dtype)


class CrossAttention(Attention):
  """Attention to the prompt and, of equal weight, to an image.

  Their keys and values come one after the other; each has its own softmax, and
  the two outputs are added.
  """

  def setup(self):
    """Makes the image's projections too, where there are images."""
    super().setup()
    config = self.config
    if config.image_width is not None:
      linear = lambda: Linear(
        config.width, config.param_dtype, width_normal(config.width)
      )
      self.image_key, self.image_value = linear(), linear()
      self.image_key_norm = RmsNorm(config.eps, config.param_dtype)

  def keys_values(
    self, x: Float[Array, "b *s m"], rope: RopeTable | None = None
  ) -> KeysValues:
    """Projects the prompt's tokens and, after them, the image's."""
    text, image = self._parts(x)
    of_text = super().keys_values(text, rope)
    if image is None:
      return of_text
    keys = self._normed(self.image_key(image), self.image_key_norm, rope)
    of_image = KeysValues(keys, self._heads(self.image_value(image)))
    join = lambda *a: jnp.concatenate(a, axis=1)
    return KeysValues(*map(join, of_text, of_image))

  def attend(self, q: Heads, both: KeysValues, attend: Attend) -> Heads:
    """Attends to the prompt, and to the image."""
    keys, image_keys = self._parts(both.keys)
    values, image_values = self._parts(both.values)
    o = attend(q, keys, values)
    if image_keys is None or image_values is None:
      return o
    return o + attend(q, image_keys, image_values)

  def _parts(self, tokens: Array) -> tuple[Array, Array | None]:
    if self.config.image_width is None:
      return tokens, None
    length = self.config.text_length
    return tokens[:, :length], tokens[:, length:]


class ImageEmbedding(nn.Module):
  """CLIP's features to tokens of the network's width."""

  config: WanConfig

  @nn.compact
  def __call__(self, image: Float[Array, "b i e"]) -> Float[Array, "b i m"]:
    """Applies the layers in the dtype of `image`."""
    config, dtype = self.config, self.config.param_dtype
    island = config.precision(image.dtype).island
    norm = lambda name: AffineLayerNorm(1e-5, dtype, name=name)
    gelu = functools.partial(nn.gelu, approximate=False)
    width = image.shape[-1]
    mlp = Mlp(width, config.width, gelu, dtype, small_normal, name="mlp")
    x = norm("norm_in")(image.astype(island)).astype(image.dtype)
    return norm("norm_out")(mlp(x).astype(island)).astype(image.dtype)


class Block(nn.Module):
  """One transformer block: self-attention, cross-attention, feed-forward.

  y = LN(x)(1 + m_1) + m_0;  x += SelfAttention(y) m_2;
  x += CrossAttention(LN_affine(x), text);
  y = LN(x)(1 + m_4) + m_3;  x += FFN(y) m_5,  m = modulation + e_6.
  """

  config: WanConfig

  def setup(self):
    """Makes the layers."""
    config, dtype = self.config, self.config.param_dtype
    self.modulation = self.param(
      "modulation", width_normal(config.width), (6, config.width), dtype
    )
    self.self_attention = Attention(config)
    self.cross_norm = AffineLayerNorm(config.eps, dtype)
    self.cross_attention = CrossAttention(config)
    self.ffn = Mlp(config.ffn_width, config.width, nn.gelu, dtype)

  def text_keys_values(self, text: Float[Array, "b l m"]) -> KeysValues:
    """Computes what cross-attention reads, once for all streams and steps."""
    return self.cross_attention.keys_values(text)

  def __call__(
    self,
    x: Tokens,
    e_6: Float[Array, "#b #f 6 m"],
    rope: RopeTable,
    text: KeysValues,
    attend: Attend,
    cross_attend: Attend,
  ) -> tuple[Tokens, KeysValues]:
    """Runs one stream through the block.

    Args:
      x: the residual stream, at least float32.
      e_6: time features of the six modulation rows, per frame.
      rope: cosines and sines of the tokens' positions.
      text: keys and values of the prompt, and of an image after them.
      attend: self-attention of this stream's queries, keys and values.
      cross_attend: attention without mask.

    Returns:
      The stream, and this layer's keys and values of its tokens.
    """
    compute = self.config.precision(x.dtype).compute
    eps = self.config.eps
    # [6, b, f, 1, m]: row i modulates all tokens of a frame.
    m = jnp.moveaxis(e_6 + self.modulation.astype(x.dtype)[None, None], 2, 0)
    m = m[..., None, :]

    y = (layer_norm(x, eps) * (1 + m[1]) + m[0]).astype(compute)
    q, own = self.self_attention.queries_keys_values(y, rope)
    o = attend(q, *own)
    x = x + self.self_attention.output(o, y).astype(x.dtype) * m[2]

    y = self.cross_norm(x).astype(compute)
    q = self.cross_attention.queries(y)
    o = self.cross_attention.attend(q, text, cross_attend)
    x = x + self.cross_attention.output(o, y).astype(x.dtype)

    y = (layer_norm(x, eps) * (1 + m[4]) + m[3]).astype(compute)
    y = checkpoint_name(self.ffn(y), FEED_FORWARD)
    return x + y.astype(x.dtype) * m[5], own


class Head(nn.Module):
  """Linear(LN(x)(1 + m_1) + m_0), m = modulation + e; initially zero."""

  config: WanConfig

  @nn.compact
  def __call__(
    self, x: Tokens, e: Float[Array, "#b #f m"]
  ) -> Float[Array, "b f p o"]:
    """Projects tokens to the features of their patches."""
    config = self.config
    modulation = self.param(
      "modulation",
      width_normal(config.width),
      (2, config.width),
      config.param_dtype,
    )
    m = e[:, :, None] + modulation.astype(e.dtype)[None, None]
    y = layer_norm(x, config.eps) * (1 + m[:, :, 1:]) + m[:, :, :1]
    features = config.patch[1] * config.patch[2] * config.out_channels
    out = Linear(
      features, config.param_dtype, nn.initializers.zeros, name="out"
    )
    return out(y)
