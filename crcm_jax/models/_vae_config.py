"""What a Wan video autoencoder's size is, and how its latents are scaled.

Wan 2.1 (Wan team, "Wan: Open and Advanced Large-Scale Video Generative
Models", arXiv 2503.20314, section 4.1) has one autoencoder for all its
networks: 16 channels, 8 x 8 pixels and 4 frames a latent, the first frame
being a latent of its own.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from crcm_jax.models._config import Precision


class Stage(NamedTuple):
  """The channels of one stage, and how the next one's frames differ."""

  inputs: int
  outputs: int
  space: bool
  """Whether rows and columns are halved or doubled at its end."""
  time: bool
  """Whether frames are, too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VaeConfig:
  """Sizes and precision of a `Vae`.

  Attributes:
    width: channels at full resolution.
    multipliers: channels of each stage, as multiples of `width`; rows and
      columns are halved after each stage but the last.
    time: after which of these stages frames are halved too.
    blocks: residual blocks of an encoder's stage; a decoder's has one more.
    channels: channels of a latent.
    mean: mean of each latent channel over Wan's training data.
    std: its standard deviation; `encode` returns (latent - mean) / std.
    dtype: dtype of the convolutions; float32 stands for at least float32.
    param_dtype: dtype of freshly initialised parameters.

  Raises:
    ValueError: if sizes do not fit each other.
  """

  width: int
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  time: tuple[bool, ...] = (False, True, True)
  blocks: int = 2
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  def __post_init__(self):
    for name in ("dtype", "param_dtype"):
      object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
    for name in ("multipliers", "time", "mean", "std"):
      object.__setattr__(self, name, tuple(getattr(self, name)))
    if len(self.time) != len(self.multipliers) - 1:
      raise ValueError(
        "`time` must say for each stage but the last whether it halves the"
        f" frames, {len(self.multipliers) - 1} entries; got {self.time}."
      )
    for name in ("mean", "std"):
      if len(getattr(self, name)) != self.channels:
        raise ValueError(
          f"`{name}` must have one entry a latent channel, {self.channels};"
          f" got {len(getattr(self, name))}."
        )

  @property
  def space_factor(self) -> int:
    """Pixels a latent, in rows and in columns."""
    return 2 ** len(self.time)

  @property
  def time_factor(self) -> int:
    """Frames a latent frame, after the first."""
    return 2 ** sum(self.time)

  def precision(self, dtype: Any) -> Precision:
    """Returns the dtypes of a pass on inputs of `dtype`."""
    return Precision.of(self, dtype)

  def encoder_stages(self) -> tuple[Stage, ...]:
    """Returns the encoder's stages, from full resolution down."""
    widths = [self.width * m for m in (1, *self.multipliers)]
    space = [True] * len(self.time) + [False]
    time = [*self.time, False]
    stages = zip(widths[:-1], widths[1:], space, time, strict=True)
    return tuple(Stage(*stage) for stage in stages)

  def decoder_stages(self) -> tuple[Stage, ...]:
    """Returns the decoder's stages, from the latents up."""
    up = [self.width * m for m in reversed(self.multipliers)]
    # A doubling of the resolution also halves the channels.
    inputs = [up[0], *(width // 2 for width in up[:-1])]
    space = [True] * len(self.time) + [False]
    time = [*reversed(self.time), False]
    return tuple(
      Stage(*stage) for stage in zip(inputs, up, space, time, strict=True)
    )

  def latent_shape(
    self, frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Returns the shape [f, h, w, c] of the latents of a clip.

    Raises:
      ValueError: if frames are not one plus a multiple of `time_factor`, or
        pixels no multiple of `space_factor`.
    """
    step, pixels = self.time_factor, self.space_factor
    if frames < 1 or (frames - 1) % step:
      below = max(1, frames - (frames - 1) % step)
      raise ValueError(
        f"`video` must have {step}k + 1 frames, the first one is a latent frame"
        f" of its own; got {frames}. Cut it to {below}."
      )
    if height % pixels or width % pixels or not height * width:
      raise ValueError(
        f"`video` must have height and width divisible by {pixels}; got"
        f" {height} x {width}. Crop it to"
        f" {max(pixels, height - height % pixels)} x"
        f" {max(pixels, width - width % pixels)}."
      )
    later = (frames - 1) // step
    return 1 + later, height // pixels, width // pixels, self.channels


WAN_VAE = VaeConfig(
  width=96,
  channels=16,
  mean=(
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
  ),
  std=(
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
  ),
)
"""The autoencoder of every Wan 2.1."""
