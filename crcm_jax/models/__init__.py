"""Wan's networks: causal transformer, autoencoder, checkpoints, caches."""

from crcm_jax.models._cache import Cache as Cache
from crcm_jax.models._checkpoint import load_params as load_params
from crcm_jax.models._checkpoint import save_params as save_params
from crcm_jax.models._chunk_model import WanChunks as WanChunks
from crcm_jax.models._config import Precision as Precision
from crcm_jax.models._config import WAN_1_3B as WAN_1_3B
from crcm_jax.models._config import WAN_14B as WAN_14B
from crcm_jax.models._config import WanConfig as WanConfig
from crcm_jax.models._convert import config_from as config_from
from crcm_jax.models._convert import convert as convert
from crcm_jax.models._remat import REMAT_POLICIES as REMAT_POLICIES
from crcm_jax.models._torch import params_from_torch as params_from_torch
from crcm_jax.models._torch import params_to_torch as params_to_torch
from crcm_jax.models._torch import save_torch as save_torch
from crcm_jax.models._torch import torch_about as torch_about
from crcm_jax.models._vae import Vae as Vae
from crcm_jax.models._vae_config import VaeConfig as VaeConfig
from crcm_jax.models._vae_config import WAN_VAE as WAN_VAE
from crcm_jax.models._vae_video import decode_chunk as decode_chunk
from crcm_jax.models._vae_video import decode_video as decode_video
from crcm_jax.models._vae_video import encode_chunk as encode_chunk
from crcm_jax.models._vae_video import encode_video as encode_video
from crcm_jax.models._vae_video import VaeCache as VaeCache
from crcm_jax.models._wan import Wan as Wan
