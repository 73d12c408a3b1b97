"""The causal Wan transformer, its caches, and its checkpoints."""

from crcm_jax.models._cache import Cache as Cache
from crcm_jax.models._checkpoint import load_params as load_params
from crcm_jax.models._checkpoint import save_params as save_params
from crcm_jax.models._chunk_model import WanChunks as WanChunks
from crcm_jax.models._config import Precision as Precision
from crcm_jax.models._config import WAN_1_3B as WAN_1_3B
from crcm_jax.models._config import WAN_14B as WAN_14B
from crcm_jax.models._config import WanConfig as WanConfig
from crcm_jax.models._remat import REMAT_POLICIES as REMAT_POLICIES
from crcm_jax.models._torch import params_from_torch as params_from_torch
from crcm_jax.models._torch import params_to_torch as params_to_torch
from crcm_jax.models._wan import add_end_time as add_end_time
from crcm_jax.models._wan import Wan as Wan
