"""Latents to tokens and back: one token a patch of rows and columns."""

import einops

from crcm_jax._typing import Array, Float


def patchify(
  x: Float[Array, "b f h w c"], patch: tuple[int, int, int]
) -> Float[Array, "b f p i"]:
  """Gathers each patch into one token, channels fastest.

  The reference's input layer orders features channel slowest and its head
  channel fastest; checkpoints are permuted once, when they are read.
  """
  return einops.rearrange(
    x, "b f (h y) (w x) c -> b f (h w) (y x c)", y=patch[1], x=patch[2]
  )


def unpatchify(
  tokens: Float[Array, "b f p o"],
  patch: tuple[int, int, int],
  *,
  height: int,
) -> Float[Array, "b f h w c"]:
  """Inverts `patchify` for frames of `height` latent rows."""
  return einops.rearrange(
    tokens,
    "b f (h w) (y x c) -> b f (h y) (w x) c",
    h=height // patch[1],
    y=patch[1],
    x=patch[2],
  )
