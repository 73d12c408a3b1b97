"""Tools to test consistency mathematics: exact teachers, golden data."""

from crcm_jax.testing import golden as golden
