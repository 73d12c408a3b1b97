r"""umT5's encoder, which embeds Wan's prompts.

Each layer has its own table of relative position biases, looked up by a bucket
of the distance j - i of key and query (exact up to 8 tokens, then logarithmic):

$$s_{ij} = q_i \cdot k_j + b_{\mathrm{bucket}(j - i)}, \quad
x \mathrel{+}= W_o\, \mathrm{softmax}(s) v, \quad
x \mathrel{+}= W_d (\mathrm{gelu}(W_g y) \odot W_u y),$$

y and the input of q, k, v being RMS-normalised x. Scores are not scaled.

References:
  Chung et al., "UniMax: Fairer and More Effective Language Sampling for
  Large-Scale Multilingual Pretraining", arXiv 2304.09151.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Bool, Float, Int
from crcm_jax.models._config import at_least_float32, Precision
from crcm_jax.models._layers import RmsNorm

Hidden = Float[Array, "b l m"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
  """Sizes and precision of a `TextEncoder`.

  Attributes:
    layers: number of blocks.
    width: width of the residual stream and of an embedding.
    heads: attention heads.
    head_width: width of a head.
    ffn_width: hidden width of the feed-forward layers.
    vocabulary: number of tokens.
    buckets: rows of the table of position biases, half of them for keys after
      the query.
    farthest: distance from which on all share a bucket.
    eps: added to the mean square in the norms.
    dtype: dtype of matrix products; float32 stands for at least float32. The
      residual stream, norms and softmax are at least float32.
    param_dtype: dtype of freshly initialised parameters.
  """

  layers: int
  width: int
  heads: int
  head_width: int
  ffn_width: int
  vocabulary: int
  buckets: int = 32
  farthest: int = 128
  eps: float = 1e-6
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):
      object.__setattr__(self, name, jnp.dtype(getattr(self, name)))

  def precision(self, dtype: Any) -> Precision:
    """Returns the dtypes of a pass with parameters of `dtype`."""
    return Precision.of(self, dtype)


UMT5_XXL = TextConfig(
  layers=24,
  width=4096,
  heads=64,
  head_width=64,
  ffn_width=10240,
  vocabulary=256384,
  dtype=jnp.bfloat16,
)
"""The text encoder of every Wan 2.1, 5.7 billion parameters."""

TEXT_RULES = (
  ("embedding", (None, "fsdp")),
  (".*/(query|key|value|gate|up)/kernel", (None, "fsdp", "tensor")),
  (".*/(out|down)/kernel", (None, "tensor", "fsdp")),
  (".*/position_bias", (None, None, "tensor")),
  (".*", ()),
)
"""Sharding rules of a `TextEncoder`, for `training.sharding.shard`."""


class Product(nn.Module):
  """y = x W."""

  features: int
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    """Applies the layer in the dtype of `x`."""
    shape = (x.shape[-1], self.features)
    init = nn.initializers.lecun_normal()
    kernel = self.param("kernel", init, shape, self.param_dtype)
    return x @ kernel.astype(x.dtype)


class TextBlock(nn.Module):
  """Self-attention with position biases, gated feed-forward."""

  config: TextConfig

  @nn.compact
  def __call__(self, x: Hidden, mask: Bool[Array, "b l"]) -> Hidden:
    """Runs the block on the residual stream, at least float32."""
    config = self.config
    compute = config.precision(x.dtype).compute
    dtype, inner = config.param_dtype, config.heads * config.head_width
    norm = lambda name: RmsNorm(config.eps, dtype, name=name)
    product = lambda features, name: Product(features, dtype, name=name)

    y = norm("attention_norm")(x).astype(compute)
    heads = lambda a: a.reshape(*a.shape[:2], config.heads, -1)
    q, k, v = (
      heads(product(inner, name)(y)) for name in ("query", "key", "value")
    )
    o = _attention(q, k, v, self._bias(x), mask).reshape(*x.shape[:2], inner)
    x = x + product(config.width, "out")(o).astype(x.dtype)

    y = norm("ffn_norm")(x).astype(compute)
    gate = nn.gelu(product(config.ffn_width, "gate")(y))
    y = gate * product(config.ffn_width, "up")(y)
    return x + product(config.width, "down")(y).astype(x.dtype)

  def _bias(self, like: Hidden) -> Float[Array, "n s z"]:
    config, length = self.config, like.shape[1]
    table = self.param(
      "position_bias",
      nn.initializers.normal(0.1),
      (config.buckets, config.heads),
      config.param_dtype,
    )
    rows = buckets(length, config.buckets, config.farthest)
    return jnp.moveaxis(table.astype(like.dtype)[rows], -1, 0)


def _attention(
  q: Float[Array, "b s n d"],
  k: Float[Array, "b z n d"],
  v: Float[Array, "b z n d"],
  bias: Float[Array, "n s z"],
  mask: Bool[Array, "b z"],
) -> Float[Array, "b s n d"]:
  """Softmax attention with biases; scores are at least float32."""
  scores = jnp.einsum(
    "bsnd,bznd->bnsz", q, k, preferred_element_type=bias.dtype
  )
  scores = jnp.where(mask[:, None, None], scores + bias[None], -jnp.inf)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bnsz,bznd->bsnd", weights, v)


def buckets(length: int, buckets: int, farthest: int) -> Int[np.ndarray, "s z"]:
  """Returns the bucket of every pair of query and key.

  Args:
    length: number of tokens.
    buckets: number of buckets.
    farthest: distance from which on all share a bucket.
  """
  distance = np.arange(length)[None] - np.arange(length)[:, None]
  half, far = buckets // 2, np.abs(distance)
  exact = half // 2
  # In float32, as the original rounds: 16 tokens are a boundary.
  ratio = np.maximum(far, 1).astype(np.float32) / np.float32(exact)
  scale = np.float32(math.log(farthest / exact))
  steps = np.log(ratio) / scale * np.float32(half - exact)
  coarse = np.minimum(exact + steps.astype(np.int32), half - 1)
  return half * (distance > 0) + np.where(far < exact, far, coarse)


class TextEncoder(nn.Module):
  """Embeds the tokens of prompts.

  Attributes:
    config: sizes and precision.

  Example:
    >>> config = TextConfig(layers=1, width=8, heads=2, head_width=4,
    ...                     ffn_width=16, vocabulary=10)
    >>> tokens, mask = jnp.array([[4, 2, 1, 0]]), jnp.array([[1, 1, 1, 0]]) == 1
    >>> model = TextEncoder(config)
    >>> params = model.init(jax.random.key(0), tokens, mask)["params"]
    >>> model.apply({"params": params}, tokens, mask).shape
    (1, 4, 8)
  """

  config: TextConfig

  @nn.compact
  def __call__(
    self, tokens: Int[Array, "b l"], mask: Bool[Array, "b l"]
  ) -> Hidden:
    """Embeds prompts.

    Args:
      tokens: of the tokenizer, padded.
      mask: which of them are tokens; the others are seen by none.

    Returns:
      Embeddings, at least float32; those of padding mean nothing.
    """
    config, dtype = self.config, self.config.param_dtype
    shape = (config.vocabulary, config.width)
    table = self.param("embedding", nn.initializers.normal(1.0), shape, dtype)
    x = table[tokens].astype(at_least_float32(table.dtype))
    body = lambda block, x, _: (block(x, mask), None)
    layers = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=config.layers,
    )
    x, _ = layers(TextBlock(config, name="blocks"), x, None)
    return RmsNorm(config.eps, dtype, name="norm")(x)
