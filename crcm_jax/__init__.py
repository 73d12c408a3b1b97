"""Distil video diffusion models into streaming few-step generators, in JAX.

The sub-packages are imported by name, each without the others' dependencies:
`from crcm_jax import losses` needs JAX alone.
"""

from crcm_jax._version import __version__ as __version__
from crcm_jax.chunks import ChunkPattern as ChunkPattern
