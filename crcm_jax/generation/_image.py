"""A picture as the first frame of a video."""

import os

import numpy as np

from crcm_jax import _extras
from crcm_jax._typing import Float


def load_image(
  path: str | os.PathLike[str], height: int, width: int
) -> Float[np.ndarray, "rows columns 3"]:
  """Reads a picture and fits it to a frame: scaled to cover it, then cut.

  Args:
    path: a file of any common format.
    height: rows of the frame.
    width: columns of the frame.

  Returns:
    Pixels in [-1, 1].

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it holds no picture, or one of zero size.
  """
  pillow = _extras.require("PIL.Image", extra="video")
  fit = _extras.require("PIL.ImageOps", extra="video").fit
  try:
    with pillow.open(path) as picture:
      if 0 in picture.size:
        raise ValueError(f"its size is {picture.size}")
      picture = fit(picture.convert("RGB"), (width, height))
      return np.asarray(picture, np.float32) / 127.5 - 1
  except FileNotFoundError:
    raise
  except (OSError, ValueError, SyntaxError) as error:  # PIL raises these
    size = os.path.getsize(path)
    raise ValueError(
      f"`image` must be a picture with pixels; {str(path)!r}, of {size} bytes,"
      f" is not ({error}). Save it as PNG or JPEG."
    ) from error
