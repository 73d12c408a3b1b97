"""What a Wan transformer is told of its video, beside the latents' times."""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Float, Int

Text: TypeAlias = Float[Array, "b l d"]


class Conditioning(NamedTuple):
  """A prompt, and for image-to-video what is known of the frames.

  An image-to-video network (`WanConfig.image_width`) needs all of it.
  """

  text: Text
  """Embeddings of the prompt."""
  image: Float[Array, "b i e"] | None = None
  """CLIP's features of the first frame, of its last layer but one."""
  frames: Float[Array, "b f h w k"] | None = None
  """A mask of the known frames and their latents, beside those of `x`."""


def as_conditioning(text: Text | Conditioning) -> Conditioning:
  """Takes a plain array for a prompt without more."""
  return text if isinstance(text, Conditioning) else Conditioning(text)


def beside(
  x: Float[Array, "b f h w c"], frames: Float[Array, "b f h w k"] | None
) -> Float[Array, "b f h w i"]:
  """Puts what is known of the frames beside their latents, channel-wise.

  Raises:
    ValueError: if it is about other frames.
  """
  if frames is None:
    return x
  if frames.shape[:4] != x.shape[:4]:
    raise ValueError(
      f"`text.frames` must be about the frames of `x`, [b, f, h, w] ="
      f" {x.shape[:4]}; got {frames.shape[:4]}. Make it of latents of that size"
      " with `image_frames`."
    )
  return jnp.concatenate([x, frames.astype(x.dtype)], axis=-1)


def frames_from(
  frames: Array | None, start: Int[Array, ""], length: int
) -> Array | None:
  """Returns what is known of the next `length` frames."""
  if frames is None:
    return None
  return jax.lax.dynamic_slice_in_dim(frames, start, length, axis=1)


def image_frames(
  latents: Float[Array, "b f h w c"], *, known: int = 1, per_latent: int = 4
) -> Float[Array, "b f h w k"]:
  """Returns `Conditioning.frames` of Wan 2.1's image-to-video networks.

  Args:
    latents: the encoded clip whose first frames are the image, later ones
      grey (zero pixels), normalised.
    known: latent frames that are known.
    per_latent: frames of a latent frame, mask channels.

  Returns:
    For each latent frame the mask, one channel a frame, 1 where it is known,
    then its latents: 4 + 16 channels.
  """
  mask = (jnp.arange(latents.shape[1]) < known).astype(latents.dtype)
  mask = mask.reshape(1, -1, 1, 1, 1)
  mask = jnp.broadcast_to(mask, (*latents.shape[:-1], per_latent))
  return jnp.concatenate([mask, latents], axis=-1)
