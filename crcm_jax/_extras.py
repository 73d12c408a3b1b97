"""Optional dependencies, imported where they are used."""

import importlib
from typing import Any


def require(module: str, *, extra: str) -> Any:
  """Imports an optional module, or says which extra brings it.

  Args:
    module: the module's import name, such as `"imageio"`.
    extra: the extra of this package that installs it.

  Returns:
    The imported module.

  Raises:
    ImportError: if the module is missing, with the pip command that cures it.
  """
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(
      f"`{module}` could not be imported ({error}). It comes with the extra"
      f" `{extra}`: pip install 'crcm_jax[{extra}]'"
    ) from error
