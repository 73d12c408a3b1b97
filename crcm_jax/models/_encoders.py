"""Wan's autoencoder and text encoder from the folder of a checkpoint."""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Float
from crcm_jax.models._prompts import Embed, load_tokenizer, prompt_embedder
from crcm_jax.models._text_encoder import TextEncoder
from crcm_jax.models._torch import params_from_torch
from crcm_jax.models._vae import Vae
from crcm_jax.models._vae_video import encode_video

# Where the original's folder has them, and that of diffusers.
_VAE_FILES = ("Wan2.1_VAE.pth", "vae")
_TEXT_FILES = ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
_TOKENIZERS = ("google/umt5-xxl", "tokenizer")


class Encoders(NamedTuple):
  """What turns videos and captions into what Wan's transformer reads."""

  encode: Callable[[np.ndarray], Float[np.ndarray, "b f h w c"]]
  """Pixels in [-1, 1], `[b, t, h, w, 3]`, to normalised latents."""
  embed: Embed


def load_encoders(
  weights: str | os.PathLike[str], *, tile: tuple[int, int] | None = None
) -> Encoders:
  """Loads the encoders of a Wan 2.1 checkpoint.

  Args:
    weights: the folder, as the original (`Wan2.1-T2V-1.3B`) or as diffusers
      lays it out; or one of your own with the same names.
    tile: rows and columns of the autoencoder's tiles, in latents; None takes
      frames whole.

  Returns:
    Functions of videos and of captions.

  Raises:
    FileNotFoundError: if a file is missing; it names all that are.
    ValueError: if a file is broken, or another network.
  """
  vae_path, text_path, tokenizer_path = _find(pathlib.Path(weights))
  vae_config, vae_params = params_from_torch(vae_path, dtype=jnp.float32)
  text_config, text_params = params_from_torch(text_path)
  vae = Vae(vae_config)

  def encode(video: np.ndarray) -> Float[np.ndarray, "b f h w c"]:
    return np.asarray(encode_video(vae, vae_params, video, tile=tile))

  tokenize = load_tokenizer(tokenizer_path)
  embed = prompt_embedder(TextEncoder(text_config), text_params, tokenize)
  return Encoders(encode, embed)


def _find(weights: pathlib.Path) -> list[pathlib.Path]:
  """Returns the paths of autoencoder, text encoder and tokenizer."""
  found, missing = [], []
  for names in (_VAE_FILES, _TEXT_FILES, _TOKENIZERS):
    there = [weights / name for name in names if (weights / name).exists()]
    found += there[:1]
    missing += [] if there else [" or ".join(names)]
  if missing:
    raise FileNotFoundError(
      f"`weights` must be the folder of a Wan 2.1 checkpoint; {weights} lacks"
      f" {', '.join(missing)}. Wan2.1-T2V-1.3B and -14B on the Hugging Face Hub"
      " (organisation Wan-AI) have them, with equal encoders."
    )
  return found
