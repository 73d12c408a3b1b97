"""The Wan video autoencoder: pixels to latents and back, piece by piece.

The encoder maps frames 0, 1-4, 5-8, ... to one latent frame each; the decoder
inverts it. Every layer is causal, so a piece of a clip needs nothing but what
the layers remember of the pieces before (see `_vae_layers`).
"""

import flax.linen as nn
import jax.numpy as jnp

from crcm_jax._typing import Array, Float
from crcm_jax.models._vae_config import Stage, VaeConfig
from crcm_jax.models._vae_layers import (
  CausalConv,
  Conv,
  Down,
  FrameAttention,
  Output,
  ResidualBlock,
  RmsNorm,
  Up,
  Video,
)


class _Stage(nn.Module):
  """Residual blocks at one resolution, then a change of it."""

  stage: Stage
  blocks: int
  resample: type[Down] | type[Up]
  config: VaeConfig

  @nn.compact
  def __call__(self, x: Video) -> Output:
    dtype = self.config.param_dtype
    for i in range(self.blocks):
      x = ResidualBlock(self.stage.outputs, dtype, name=f"block_{i}")(x)
    if self.stage.space:
      x = self.resample(self.stage.time, dtype, name="resample")(x)
    return x


class _Middle(nn.Module):
  """Residual block, attention within frames, residual block."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: Video) -> Video:
    c, dtype = x.shape[-1], self.config.param_dtype
    x = ResidualBlock(c, dtype, name="block_0")(x)
    x = FrameAttention(dtype, name="attention")(x)
    return ResidualBlock(c, dtype, name="block_1")(x)


class _Ends(nn.Module):
  """silu(norm(x)), convolved to the features that leave."""

  features: int
  config: VaeConfig

  @nn.compact
  def __call__(self, x: Video) -> Output:
    x = nn.silu(RmsNorm(self.config.param_dtype, name="norm")(x))
    return CausalConv(self.features, self.config.param_dtype, name="conv")(x)


class Encoder(nn.Module):
  """Pixels to the mean and the log variance of latents."""

  config: VaeConfig

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Encodes the next frames of a clip."""
    config = self.config
    x = CausalConv(config.width, config.param_dtype, name="conv_in")(x)
    for i, stage in enumerate(config.encoder_stages()):
      x = _Stage(stage, config.blocks, Down, config, name=f"stage_{i}")(x)
    x = _Middle(config, name="middle")(x)
    x = _Ends(2 * config.channels, config, name="out")(x)
    return _pointwise(x, config, "moments")


class Decoder(nn.Module):
  """Latents to pixels."""

  config: VaeConfig

  @nn.compact
  def __call__(self, z: Video) -> Output:
    """Decodes the next latent frames of a clip."""
    config, stages = self.config, self.config.decoder_stages()
    x = _pointwise(z, config, "latents")
    x = CausalConv(stages[0].inputs, config.param_dtype, name="conv_in")(x)
    x = _Middle(config, name="middle")(x)
    for i, stage in enumerate(stages):
      x = _Stage(stage, config.blocks + 1, Up, config, name=f"stage_{i}")(x)
    return _Ends(3, config, name="out")(x)


def _pointwise(x: Video, config: VaeConfig, name: str) -> Video:
  return Conv(x.shape[-1], (1, 1, 1), config.param_dtype, name=name)(x)


class Vae(nn.Module):
  """Encodes and decodes video, a clip at once or piece by piece.

  `decode_chunk`, `decode_video` and their kin call it; without them, a clip is
  `vae.apply({"params": params}, latents, method="decode")`.

  Attributes:
    config: sizes and precision.
  """

  config: VaeConfig

  def setup(self):
    """Makes the two networks."""
    self.encoder = Encoder(self.config)
    self.decoder = Decoder(self.config)

  def __call__(self, video: Float[Array, "b t h w 3"]) -> Array:
    """Encodes and decodes; `init` calls it."""
    return self.decode(self.encode(video))

  def encode(self, video: Float[Array, "b t h w 3"]) -> Output:
    """Encodes the next frames of a clip.

    Args:
      video: pixels in [-1, 1]; a clip starts with frame 0 and has 4k + 1
        frames, a piece that goes on has 4k.

    Returns:
      The posterior's mean, normalised channel by channel; at least float32.
    """
    precision = self.config.precision(video.dtype)
    moments = self.encoder(video.astype(precision.compute))
    mean, std = self._scale(precision.island)
    return (moments[..., : mean.size].astype(precision.island) - mean) / std

  def decode(self, latents: Video) -> Output:
    """Decodes the next latent frames of a clip.

    Args:
      latents: as `encode` returns them.

    Returns:
      Pixels in [-1, 1], in the config's dtype.
    """
    precision = self.config.precision(latents.dtype)
    mean, std = self._scale(precision.island)
    z = latents.astype(precision.island) * std + mean
    return jnp.clip(self.decoder(z.astype(precision.compute)), -1, 1)

  def _scale(self, dtype: jnp.dtype) -> tuple[Array, Array]:
    along = (1, 1, 1, 1, -1)
    mean = jnp.asarray(self.config.mean, dtype).reshape(along)
    return mean, jnp.asarray(self.config.std, dtype).reshape(along)
