"""What a Wan transformer's size is, and in which precision it computes.

Wan 2.1 (Wan team, "Wan: Open and Advanced Large-Scale Video Generative
Models", arXiv 2503.20314) comes in two sizes, given here as presets.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from crcm_jax.models._remat import REMAT_POLICIES


@dataclasses.dataclass(frozen=True)
class Precision:
  """The dtypes of one forward pass; the only precision policy.

  Matrix products and attention run in `compute`. The residual stream and the
  *islands* are at least float32: the time path (sinusoid, MLPs, modulation),
  LayerNorm and RMSNorm, rotary embedding, gates, and the output head. Times
  never become bfloat16: the reference rounds 1000 t = 750 to 752, which moves
  the network off the point whose velocity the loss asks for
  (`WanConfig.bfloat16_times` restores it).

  The reference's two networks differ in bfloat16 (SPEC section 13): its plain
  network gates in bfloat16, the one that carries tangents gates in float32 and
  runs its feed-forward layers in float32 as well. We follow the latter in the
  residual stream, whose rounding a tangent magnifies, and the former in the
  feed-forward products, which cost most of the time.

  Attributes:
    params: dtype in which parameters are kept; each layer casts them to the
      dtype it computes in.
    compute: dtype of matrix products and attention.
    residual: dtype of the residual stream, at least float32.
    island: dtype of the islands, at least float32.
  """

  params: Any
  compute: Any
  residual: Any
  island: Any

  @classmethod
  def of(cls, config: Any, dtype: Any) -> "Precision":
    """Returns the dtypes of a pass on inputs of `dtype`.

    Args:
      config: has the network's `dtype` (float32: that of the islands) and
        `param_dtype`.
      dtype: of the inputs.
    """
    island = at_least_float32(dtype)
    compute = island if config.dtype == jnp.float32 else config.dtype
    return cls(config.param_dtype, compute, residual=island, island=island)


def at_least_float32(dtype: Any) -> Any:
  """Returns float64 for float64, else float32."""
  return jnp.dtype("float64" if dtype == jnp.float64 else "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanConfig:
  """Sizes and precision of a `Wan` transformer.

  Attributes:
    layers: number of transformer blocks.
    width: width of the residual stream; a multiple of `2 * heads`.
    heads: attention heads.
    ffn_width: hidden width of the feed-forward layers.
    freq_width: width of the sinusoidal time features (even).
    text_width: width of one text embedding.
    text_length: text embeddings a prompt; shorter prompts are padded with
      zeros, which the network attends to as the reference does.
    in_channels: channels of a latent.
    out_channels: channels of the velocity.
    image_width: width of CLIP's features in an image-to-video network; its
      `in_channels` count `Conditioning.frames` too. None is text-to-video.
    patch: latent frames, rows and columns of one token; one frame always.
    eps: added to the variance in the norms.
    time_scale: a rectified-flow time times this enters the sinusoid.
    end_time: whether the network has a second time input, where the jump of
      its velocity ends (MeanFlow). `models.add_end_time` gives it to a
      trained network.
    remat: what the backward pass finds saved, a name in
      `models.REMAT_POLICIES`; None saves everything.
    dtype: dtype of matrix products and attention (see `Precision`); float32
      stands for at least float32, so float64 inputs stay float64.
    param_dtype: dtype of freshly initialised parameters.
    bfloat16_times: whether scaled times are rounded to bfloat16 (625 to 624,
      750 to 752), as the original does in training and sampling. Set it to go
      on with weights that were trained so and to reproduce their samples.

  Raises:
    ValueError: if sizes do not fit each other or `remat` is unknown.
  """

  layers: int
  width: int
  heads: int
  ffn_width: int
  text_width: int
  text_length: int
  freq_width: int = 256
  in_channels: int = 16
  out_channels: int = 16
  image_width: int | None = None
  patch: tuple[int, int, int] = (1, 2, 2)
  eps: float = 1e-6
  time_scale: float = 1000.0
  end_time: bool = False
  remat: str | None = None
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  bfloat16_times: bool = False

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):
      object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
    object.__setattr__(self, "patch", tuple(self.patch))
    if self.width % (2 * self.heads):
      raise ValueError(
        "`width` must be a multiple of `2 * heads`, features turn in pairs;"
        f" got width {self.width} with {self.heads} heads."
      )
    if len(self.patch) != 3 or self.patch[0] != 1:
      raise ValueError(
        "`patch` must be (1, rows, columns), one latent frame a token; got"
        f" {self.patch}."
      )
    if self.freq_width % 2:
      raise ValueError(
        f"`freq_width` must be even, cosines and sines; got {self.freq_width}."
      )
    if self.remat is not None and self.remat not in REMAT_POLICIES:
      raise ValueError(
        f"`remat` must be None or one of {sorted(REMAT_POLICIES)}; got"
        f" {self.remat!r}."
      )

  @property
  def head_width(self) -> int:
    """Width of one attention head."""
    return self.width // self.heads

  def precision(self, dtype: Any) -> Precision:
    """Returns the dtypes of a forward pass on inputs of `dtype`."""
    return Precision.of(self, dtype)

  def tokens_per_frame(self, height: int, width: int) -> int:
    """Returns the tokens of one latent frame of `height` x `width`.

    Raises:
      ValueError: if the patch does not divide the frame.
    """
    rows, columns = self.patch[1:]
    if height % rows or width % columns:
      raise ValueError(
        f"`x` must have height and width divisible by the patch {rows} x"
        f" {columns}; got {height} x {width}. Crop or pad the latents."
      )
    return height * width // (rows * columns)

  @classmethod
  def from_wan(cls, wan: Mapping[str, Any], **changes: Any) -> "WanConfig":
    """Reads the `config.json` that comes with an original Wan checkpoint.

    Args:
      wan: its entries (`dim`, `ffn_dim`, `num_heads`, ...).
      **changes: fields of `WanConfig` to set on top.

    Returns:
      The same network's `WanConfig`.

    Raises:
      ValueError: if an entry is missing.
    """
    missing = sorted(set(_WAN_NAMES.values()) - set(wan))
    if missing:
      raise ValueError(
        f"`wan` must hold the entries of a Wan config.json; {missing} are"
        " missing. Pass a `WanConfig` built by hand instead."
      )
    fields = {ours: wan[theirs] for ours, theirs in _WAN_NAMES.items()}
    fields["patch"] = tuple(wan.get("patch_size", (1, 2, 2)))
    if wan.get("model_type") == "i2v":
      fields["image_width"] = CLIP_WIDTH
    return cls(**(fields | changes))

  def parameter_count(self) -> int:
    """Returns the number of parameters, in closed form."""
    d, f = self.width, self.ffn_width
    pixels = math.prod(self.patch)
    linear = lambda rows, columns: rows * columns + columns
    attention = 4 * linear(d, d) + 2 * d
    block = 2 * attention + linear(d, f) + linear(f, d) + 6 * d + 2 * d
    embedding = linear(self.freq_width, d) + linear(d, d)
    time = (1 + self.end_time) * embedding + linear(d, 6 * d)
    text = linear(self.text_width, d) + linear(d, d)
    head = linear(d, pixels * self.out_channels) + 2 * d
    patch = linear(pixels * self.in_channels, d)
    image = 0
    if (e := self.image_width) is not None:
      block += 2 * linear(d, d) + d
      image = 2 * e + linear(e, e) + linear(e, d) + 2 * d
    return self.layers * block + time + text + head + patch + image


CLIP_WIDTH = 1280
"""Width of the CLIP features that Wan 2.1's image-to-video networks read."""

_WAN_NAMES = {
  "layers": "num_layers",
  "width": "dim",
  "heads": "num_heads",
  "ffn_width": "ffn_dim",
  "freq_width": "freq_dim",
  "text_width": "text_dim",
  "text_length": "text_len",
  "in_channels": "in_dim",
  "out_channels": "out_dim",
}

WAN_1_3B = WanConfig(
  layers=30,
  width=1536,
  heads=12,
  ffn_width=8960,
  text_width=4096,
  text_length=512,
  dtype=jnp.bfloat16,
)
"""Wan 2.1 text-to-video, 1.3 billion parameters."""

WAN_14B = WanConfig(
  layers=40,
  width=5120,
  heads=40,
  ffn_width=13824,
  text_width=4096,
  text_length=512,
  dtype=jnp.bfloat16,
)
"""Wan 2.1 text-to-video, 14 billion parameters."""

WAN_14B_IMAGE = dataclasses.replace(
  WAN_14B, in_channels=36, image_width=CLIP_WIDTH
)
"""Wan 2.1 image-to-video, 14 billion parameters, 480p and 720p."""
