"""The parts of a Wan video autoencoder, causal in time.

All run on videos `[b f h w c]`, in the dtype of their input. What a layer needs
of the frames before is its *past*: it lies in the collection "cache", which
`apply` takes and, where that collection is mutable, returns. Without it a clip
starts. So a clip that is cut into pieces gives, piece by piece, what it gives
whole.
"""

from typing import Any, TypeAlias

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from crcm_jax import kernels
from crcm_jax._typing import Array, Float
from crcm_jax.models._config import at_least_float32

Video: TypeAlias = Float[Array, "b f h w c"]
Output: TypeAlias = Float[Array, "b f_out h_out w_out c_out"]
"""A video whose axes may differ from those of what came in."""

_ATTENTION = kernels.Xla(block_queries=2048, block_keys=8192)
"""One wide head: few large tiles keep a GPU busier than many small ones."""

_kernel_init = nn.initializers.lecun_normal()


class Past(nn.Module):
  """The last frames that came by, put before those that come."""

  frames: int

  @property
  def exists(self) -> bool:
    """Whether frames came by, in an earlier piece of the clip."""
    return self.has_variable("cache", "frames")

  def prepend(self, x: Video) -> Output:
    """Returns the past and `x`; zeros are the past of a clip's start."""
    zeros = jnp.zeros((x.shape[0], self.frames, *x.shape[2:]), x.dtype)
    past = self.get_variable("cache", "frames", zeros)
    return jnp.concatenate([past, x], axis=1)

  def keep(self, x: Video) -> None:
    """Remembers the last frames of `x`, where the cache is mutable."""
    if self.is_mutable_collection("cache"):
      self.put_variable("cache", "frames", x[:, -self.frames :])


class Conv(nn.Module):
  """A convolution over frames, rows and columns, without padding in time.

  It is computed as one of images, whose channels are those of all the frames
  that a frame is made of: cuDNN convolves images of bfloat16 channels last, on
  matrix units, but XLA lays out video channels first for it.
  """

  features: int
  kernel: tuple[int, int, int]
  param_dtype: Any
  strides: tuple[int, int, int] = (1, 1, 1)
  space_padding: tuple[int, int] | None = None
  """Zeros before and after rows and columns; None keeps their number."""

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Applies the layer in the dtype of `x`."""
    shape = (*self.kernel, x.shape[-1], self.features)
    kernel = self.param("kernel", _kernel_init, shape, self.param_dtype)
    bias = self.param(
      "bias", nn.initializers.zeros, (self.features,), self.param_dtype
    )
    same = [((size - 1) // 2, size // 2) for size in self.kernel[1:]]
    padding = same if self.space_padding is None else [self.space_padding] * 2
    images = self._side_by_side(x)
    y = jax.lax.conv_general_dilated(
      einops.rearrange(images, "b f h w c -> (b f) h w c"),
      einops.rearrange(kernel.astype(x.dtype), "k h w c o -> h w (k c) o"),
      self.strides[1:],
      padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(x.shape[0], -1, *y.shape[1:])
    return y + bias.astype(x.dtype).reshape(1, 1, 1, 1, -1)

  def _side_by_side(self, x: Video) -> Output:
    """Puts the frames that each new frame is made of into its channels."""
    taps, stride = self.kernel[0], self.strides[0]
    last = x.shape[1] - taps + 1
    frames = [x[:, tap : tap + last : stride] for tap in range(taps)]
    return frames[0] if taps == 1 else jnp.concatenate(frames, axis=-1)


class CausalConv(nn.Module):
  """A convolution of each frame with the frames before it."""

  features: int
  param_dtype: Any
  kernel: tuple[int, int, int] = (3, 3, 3)

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Applies the layer to the next frames of a clip."""
    past = Past(self.kernel[0] - 1, name="past")
    x = past.prepend(x)
    past.keep(x)
    conv = Conv(self.features, self.kernel, self.param_dtype, name="conv")
    return conv(x)


class RmsNorm(nn.Module):
  """x / sqrt(mean(x^2)) * scale over the channels, at least float32 inside."""

  param_dtype: Any

  @nn.compact
  def __call__(self, x: Video) -> Video:
    """Applies the norm, in the dtype of `x`."""
    scale = self.param(
      "scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype
    )
    wide = x.astype(at_least_float32(x.dtype))
    # The reference divides by max(|x|, 1e-12), |x|^2 being the sum.
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(square, 1e-24) / x.shape[-1])
    scale = scale.astype(wide.dtype).reshape(1, 1, 1, 1, -1)
    return (wide * inverse * scale).astype(x.dtype)


class ResidualBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), x projected where it widens."""

  features: int
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Applies the block to the next frames of a clip."""
    dtype, y = self.param_dtype, x
    for i in (1, 2):
      y = nn.silu(RmsNorm(dtype, name=f"norm_{i}")(y))
      y = CausalConv(self.features, dtype, name=f"conv_{i}")(y)
    if x.shape[-1] != self.features:
      x = Conv(self.features, (1, 1, 1), dtype, name="shortcut")(x)
    return x + y


class FrameAttention(nn.Module):
  """x + out(attention(q, k, v)) over the pixels of each frame, one head."""

  param_dtype: Any

  @nn.compact
  def __call__(self, x: Video) -> Video:
    """Applies the block; frames do not see each other."""
    pointwise = lambda features, name: Conv(
      features, (1, 1, 1), self.param_dtype, name=name
    )
    y = RmsNorm(self.param_dtype, name="norm")(x)
    y = pointwise(3 * x.shape[-1], "qkv")(y)
    pixels = einops.rearrange(y, "b f h w c -> (b f) (h w) 1 c")
    q, k, v = jnp.split(pixels, 3, axis=-1)
    o = kernels.attention(q, k, v, implementation=_ATTENTION).reshape(x.shape)
    return x + pointwise(x.shape[-1], "out")(o)


class Down(nn.Module):
  """Halves rows and columns and, with `time`, frames.

  A clip's first frame stays alone: frame 0 gives frame 0, frames 2j - 2 to 2j
  give frame j.
  """

  time: bool
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Applies the layer to the next frames of a clip."""
    c, dtype = x.shape[-1], self.param_dtype
    x = Conv(c, (1, 3, 3), dtype, (1, 2, 2), (0, 1), name="space")(x)
    if not self.time:
      return x
    past = Past(1, name="past")
    first = x[:, : 0 if past.exists else 1]
    x = past.prepend(x) if past.exists else x
    past.keep(x)
    later = Conv(c, (3, 1, 1), dtype, (2, 1, 1), name="time_conv")(x)
    return jnp.concatenate([first, later], axis=1)


class Up(nn.Module):
  """Doubles rows and columns and, with `time`, frames; halves the channels.

  A clip's first frame stays alone, and no later frame sees it here.
  """

  time: bool
  param_dtype: Any

  @nn.compact
  def __call__(self, x: Video) -> Output:
    """Applies the layer to the next frames of a clip."""
    if self.time:
      x = self._double_frames(x)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    conv = Conv(x.shape[-1] // 2, (1, 3, 3), self.param_dtype, name="space")
    return conv(x)

  def _double_frames(self, x: Video) -> Output:
    past = Past(2, name="past")
    alone = 0 if past.exists else 1
    later = past.prepend(x[:, alone:])
    past.keep(later)
    conv = Conv(2 * x.shape[-1], (3, 1, 1), self.param_dtype, name="time_conv")
    doubled = einops.rearrange(
      conv(later), "b f h w (k c) -> b (f k) h w c", k=2
    )
    return jnp.concatenate([x[:, :alone], doubled], axis=1)
