"""Attention over [context | own] keys: one differentiable call, any backend."""

from crcm_jax.kernels.api import attention as attention
from crcm_jax.kernels.api import BACKENDS as BACKENDS
from crcm_jax.kernels.autodiff import save_attention as save_attention
from crcm_jax.kernels.backend import Backend as Backend
from crcm_jax.kernels.block_sizes import BlockSizes as BlockSizes
from crcm_jax.kernels.block_sizes import Walk as Walk
from crcm_jax.kernels.mask import BlockMask as BlockMask
from crcm_jax.kernels.mask import Row as Row
from crcm_jax.kernels.pallas_tpu import PallasTpu as PallasTpu
from crcm_jax.kernels.pallas_tpu import TpuBlocks as TpuBlocks
from crcm_jax.kernels.triton_backend import Triton as Triton
from crcm_jax.kernels.xla import Xla as Xla
