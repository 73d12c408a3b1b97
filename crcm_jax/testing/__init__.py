"""Tools to test consistency mathematics: exact teachers, golden data."""

from crcm_jax.testing import golden as golden
from crcm_jax.testing._teachers import GaussianTeacher as GaussianTeacher
from crcm_jax.testing._teachers import MixtureTeacher as MixtureTeacher
