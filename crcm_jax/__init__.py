"""Distil video diffusion models into streaming few-step generators, in JAX."""

from crcm_jax._version import __version__ as __version__
