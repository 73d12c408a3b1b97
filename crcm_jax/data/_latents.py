"""Latents of small canvases: a fixed block transform in place of a VAE.

Each block of 4 x 4 pixels becomes the 16 coefficients of its orthonormal
two-dimensional DCT-II, shifted and scaled by constants of each frequency:

  z = (D block - MEAN) / SCALE,    block = D^T (SCALE z + MEAN),    D D^T = 1

so the map is linear, local, and exactly invertible; a 32 x 32 canvas in
[-1, 1] becomes 8 x 8 x 16. As with a VAE, pixels are reached only through here.

Why these constants: on moving digits the frequencies' standard deviations span
1.5 to 0.015. One common scale leaves the finest ones far below the noise of
any time but the last; dividing by each one's own spends a small network on
detail that hardly changes a pixel. `SCALE` is the geometric middle,
proportional to the square root of each standard deviation, and makes the mean
variance over frequencies 1. `MEAN` moves the mean brightness to zero.
"""

import functools
from typing import TypeAlias

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

BLOCK = 4
"""Height and width of a block, in pixels."""

# Standard deviation of each frequency (vertical, horizontal) over the 8,192
# training clips, mean of the two orders; checked in tests/data.
_STD = np.array(
  [
    [1.549, 0.598, 0.267, 0.096],
    [0.598, 0.317, 0.159, 0.058],
    [0.267, 0.159, 0.081, 0.031],
    [0.096, 0.058, 0.031, 0.015],
  ]
).ravel()

SCALE = np.sqrt(_STD * _STD.mean())
"""What one unit of each latent channel is worth, `[16]`."""

MEAN = np.zeros(BLOCK * BLOCK)
"""Mean of each frequency, `[16]`: only the first, the brightness, has one."""
MEAN[0] = -3.308

_Array: TypeAlias = jax.Array | np.ndarray


def latents_from_video(
  video: Float[_Array, "*b f h w c"],
) -> Float[_Array, "*b f h//4 w//4 16*c"]:
  """Transforms pixels to latents, `[32, 32, c]` to `[8, 8, 16 c]` a frame.

  Args:
    video: pixels in [-1, 1]; height and width are multiples of 4. NumPy in,
      NumPy out; JAX in, JAX out; the dtype is kept.

  Returns:
    Latents. Channel `16 c + 4 u + v` holds colour `c` at vertical frequency
    `u` and horizontal frequency `v`.

  Raises:
    ValueError: if height or width is not a multiple of 4.

  Example:
    >>> latents_from_video(np.zeros((21, 32, 32, 1))).shape
    (21, 8, 8, 16)
  """
  if video.shape[-3] % BLOCK or video.shape[-2] % BLOCK:
    raise ValueError(
      f"`video` must have a height and width that are multiples of {BLOCK};"
      f" got {video.shape[-3]} x {video.shape[-2]}. Pad or crop it."
    )
  blocks = einops.rearrange(
    video, "... (h i) (w j) c -> ... h w c (i j)", i=BLOCK, j=BLOCK
  )
  mean, scale = MEAN.astype(video.dtype), SCALE.astype(video.dtype)
  z = (_matmul(blocks, _dct().T) - mean) / scale
  return einops.rearrange(z, "... c k -> ... (c k)")


def video_from_latents(
  latents: Float[_Array, "*b f h w c"],
) -> Float[_Array, "*b f 4*h 4*w c//16"]:
  """Transforms latents to pixels: the exact inverse of `latents_from_video`.

  Args:
    latents: `[8, 8, 16 c]` a frame.

  Returns:
    Pixels, `[32, 32, c]` a frame; in [-1, 1] where the latents are a video's,
    a little beyond where they are a network's.

  Raises:
    ValueError: if the channels are not a multiple of 16.
  """
  k = BLOCK * BLOCK
  if latents.shape[-1] % k:
    raise ValueError(
      f"`latents` must have a multiple of {k} channels, one for each frequency"
      f" and colour; got {latents.shape[-1]}. Put the channels last."
    )
  z = einops.rearrange(latents, "... (c k) -> ... c k", k=k)
  mean, scale = MEAN.astype(z.dtype), SCALE.astype(z.dtype)
  blocks = _matmul(z * scale + mean, _dct())
  return einops.rearrange(
    blocks, "... h w c (i j) -> ... (h i) (w j) c", i=BLOCK, j=BLOCK
  )


def _matmul(x: _Array, matrix: np.ndarray) -> _Array:
  """`x @ matrix` in the dtype of `x`, at full precision on every device."""
  matrix = matrix.astype(x.dtype)
  if isinstance(x, np.ndarray):
    return x @ matrix
  return jnp.matmul(x, matrix, precision=jax.lax.Precision.HIGHEST)


@functools.cache
def _dct() -> Float[np.ndarray, "k k"]:
  """Returns D: row 4 u + v is frequency (u, v) over a block's pixels."""
  frequency, pixel = np.arange(BLOCK)[:, None], np.arange(BLOCK)
  d = np.cos(np.pi * frequency * (2 * pixel + 1) / (2 * BLOCK))
  d *= np.where(frequency == 0, np.sqrt(1 / BLOCK), np.sqrt(2 / BLOCK))
  return np.kron(d, d)
