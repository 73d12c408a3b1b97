"""Where the networks lie in a folder of Wan's weights.

A folder is laid out as the original's, as that of diffusers, or with files of
`crcm convert`, whose suffix is always `.safetensors`.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence

PLACES: Mapping[str, Sequence[str]] = {
  "transformer": (
    "transformer",
    "transformer.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
  ),
  "autoencoder": ("vae", "vae.safetensors", "Wan2.1_VAE.pth"),
  "text encoder": (
    "text_encoder",
    "text_encoder.safetensors",
    "models_t5_umt5-xxl-enc-bf16.pth",
  ),
  "tokenizer": ("tokenizer", "google/umt5-xxl"),
}
"""Names of each network, the first that exists being taken."""

WHERE_FROM = (
  "Wan 2.1's are published as Wan-AI/Wan2.1-T2V-1.3B (or -14B) and, in the"
  " layout of diffusers, as Wan-AI/Wan2.1-T2V-1.3B-Diffusers; a distilled"
  " student is a transformer alone, which takes that one's place."
)
"""Where weights come from: nothing is downloaded."""


def files_of(parts: Sequence[str] = tuple(PLACES)) -> str:
  """Names the files and folders, one of which each network is read from."""
  return "; ".join(f"{part} ({' or '.join(PLACES[part])})" for part in parts)


def find_networks(
  folder: str | os.PathLike[str],
  parts: Sequence[str] = tuple(PLACES),
  *,
  transformer: str | os.PathLike[str] | None = None,
) -> dict[str, pathlib.Path]:
  """Returns where each network of a folder lies.

  Args:
    folder: of the weights.
    parts: which of `PLACES` are needed.
    transformer: another file or folder for the transformer.

  Raises:
    FileNotFoundError: if a part is missing; all that are, are named.
  """
  found = {}
  for part in parts:
    places = [pathlib.Path(folder, name) for name in PLACES[part]]
    found[part] = next((place for place in places if place.exists()), None)
  if transformer is not None:
    found["transformer"] = pathlib.Path(transformer)
  missing = [part for part, place in found.items() if place is None]
  if missing:
    raise FileNotFoundError(
      f"`weights` must be a folder with Wan's networks; {str(folder)!r} lacks:"
      f" {files_of(missing)}. {WHERE_FROM}"
    )
  return {part: place for part, place in found.items() if place is not None}
