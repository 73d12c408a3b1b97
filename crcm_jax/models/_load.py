"""One way to read a network, whichever project's file it lies in."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from crcm_jax._typing import Params
from crcm_jax.models._checkpoint import load_params
from crcm_jax.models._convert import config_from
from crcm_jax.models._tensor_files import open_tensors
from crcm_jax.models._torch import params_from_torch, torch_about


def load_network(
  path: str | os.PathLike[str],
  config: Any = None,
  *,
  dtype: Any = None,
  group: str | None = None,
  expect: Mapping[str, Any] | None = None,
) -> tuple[Any, Params, dict[str, Any]]:
  """Reads a Wan network: a file of ours, or one of a PyTorch project.

  Args:
    path: what `load_params` or `params_from_torch` reads.
    config: its config; None takes that of the file.
    dtype: dtype of the parameters; None keeps the stored one.
    group: which of several networks of a PyTorch project's file to take.
    expect: what the file must say of itself where it says anything.

  Returns:
    Its config, its parameters, and what the file says of itself.

  Raises:
    FileNotFoundError: if the file or a shard of it is missing.
    ValueError: if it is broken, no Wan network, or contradicts `expect`.
  """
  path = pathlib.Path(path)
  if any("/" in key for key in open_tensors(path).tensors):
    params, about = load_params(path, dtype=dtype, expect=expect)
    return config or config_from(about), params, about
  config, params = params_from_torch(
    path, config, dtype=dtype, group=group, expect=expect
  )
  return config, params, torch_about(path)
