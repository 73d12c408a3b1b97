"""Tools to test consistency mathematics: teachers, checks, golden data."""

from crcm_jax.testing import golden as golden
from crcm_jax.testing._checks import CausalityReport as CausalityReport
from crcm_jax.testing._checks import check_block_causal as check_block_causal
from crcm_jax.testing._checks import check_cache_parity as check_cache_parity
from crcm_jax.testing._checks import check_tangent as check_tangent
from crcm_jax.testing._checks import ParityReport as ParityReport
from crcm_jax.testing._checks import TangentReport as TangentReport
from crcm_jax.testing._per_example import (
  check_loss_is_per_example as check_loss_is_per_example,
)
from crcm_jax.testing._per_example import (
  IndependenceReport as IndependenceReport,
)
from crcm_jax.testing._teachers import GaussianTeacher as GaussianTeacher
from crcm_jax.testing._teachers import MixtureTeacher as MixtureTeacher
