"""Wan's autoencoder and text encoder from the folder of a checkpoint."""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Float
from crcm_jax.models._folder import find_networks
from crcm_jax.models._load import load_network
from crcm_jax.models._prompts import Embed, load_tokenizer, prompt_embedder
from crcm_jax.models._text_encoder import TextEncoder
from crcm_jax.models._vae import Vae
from crcm_jax.models._vae_video import encode_video


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
    weights: the folder; see `find_networks`. It needs no transformer.
    tile: rows and columns of the autoencoder's tiles, in latents; None takes
      frames whole.

  Returns:
    Functions of videos and of captions.

  Raises:
    FileNotFoundError: if a file is missing; it names all that are.
    ValueError: if a file is broken, or another network.
  """
  parts = ("autoencoder", "text encoder", "tokenizer")
  places = find_networks(weights, parts)
  vae_config, vae_params, _ = load_network(
    places["autoencoder"], dtype=jnp.float32
  )
  text_config, text_params, _ = load_network(places["text encoder"])
  vae = Vae(vae_config)

  def encode(video: np.ndarray) -> Float[np.ndarray, "b f h w c"]:
    return np.asarray(encode_video(vae, vae_params, video, tile=tile))

  tokenize = load_tokenizer(places["tokenizer"])
  embed = prompt_embedder(TextEncoder(text_config), text_params, tokenize)
  return Encoders(encode, embed)
