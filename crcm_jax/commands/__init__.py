"""The commands of `crcm` that have modules of their own."""

import os
import pathlib

CACHE = pathlib.Path(
  os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"), "crcm_jax"
)
"""Compiled programs, datasets and prompts, which runs share."""
