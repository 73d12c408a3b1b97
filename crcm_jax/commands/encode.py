"""`crcm encode`: videos and captions, or tar shards, into a dataset."""

import argparse
import hashlib
import logging
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import tqdm

from crcm_jax import data, models

_LOG = logging.getLogger("crcm_jax")

_UNIT = models.WAN_VAE.space_factor * models.WAN_1_3B.patch[1]

EXAMPLES = """examples:
  crcm encode videos/ --out data --name pets --weights Wan2.1-T2V-1.3B
  crcm encode videos/ --captions captions.csv --out data --name pets \\
    --weights Wan2.1-T2V-1.3B --size 480x832 --frames 81 --fps 16
  crcm encode shards/*.tar --out data --name rcm --null-embedding null.pt

A folder holds videos, each with its caption beside it (a.mp4, a.txt) or in a
.csv or .jsonl with `video` and `caption`. Tar shards hold KEY.latent.pt,
KEY.embed.pt and KEY.prompt.txt. The dataset's folder, which is printed, goes
into a config: data=dict(name="wan_latents", folder=..., batch_size=...). The
same command goes on where the encoding of videos was stopped."""


def encode(arguments: argparse.Namespace) -> None:
  """Prepares a dataset of latents from videos and captions, or tar shards."""
  data.check_wan_latents_name(arguments.out, arguments.name)
  sources = [pathlib.Path(source) for source in arguments.source]
  if all(source.suffix == ".tar" for source in sources):
    null = _null_of_shards(arguments)
    records = data.read_latent_shards(
      tqdm.tqdm(sources, desc="encode", unit="shard")
    )
  elif len(sources) == 1:
    null, records = _encoded_videos(sources[0], arguments)
  else:
    raise ValueError(
      "SOURCE must be one folder of videos, or tar shards; got"
      f" {arguments.source}."
    )
  folder = data.prepare_wan_latents(
    arguments.out,
    arguments.name,
    records,
    null_embedding=null,
    max_bad=arguments.max_bad,
    dtype=arguments.dtype,
  )
  shutil.rmtree(_kept_folder(arguments), ignore_errors=True)
  info = data.describe_wan_latents(folder)
  _LOG.info(
    "%d videos of latents %s, %d skipped.",
    info.examples,
    info.latents,
    len(info.skipped),
  )
  print(folder)


def _null_of_shards(arguments: argparse.Namespace) -> np.ndarray:
  """Reads what stands in for a dropped caption, which shards do not hold."""
  if arguments.null_embedding is not None:
    return data.read_embedding(arguments.null_embedding)
  if arguments.weights is not None:
    embed = models.load_encoders(arguments.weights).embed
    return embed([arguments.null_prompt])[0]
  raise ValueError(
    "`--null-embedding` must be a .pt or .npy of the embeddings that stand in"
    " for a dropped caption, for the shards hold none; or let `--weights DIR`"
    " embed `--null-prompt`."
  )


def _encoded_videos(
  folder: pathlib.Path, arguments: argparse.Namespace
) -> tuple[np.ndarray, Any]:
  """Returns the null prompt's embedding, and videos that are yet to encode."""
  videos = data.find_videos(folder, arguments.captions)
  if arguments.weights is None:
    raise ValueError(
      "`--weights` must be the folder of a Wan 2.1 checkpoint, whose"
      " autoencoder and text encoder are used."
    )
  frames, size = arguments.frames, arguments.size
  models.WAN_VAE.latent_shape(frames, *size)
  if any(side % _UNIT for side in size):
    raise ValueError(
      f"`--size` must be divisible by {_UNIT}, for a token of the transformer"
      f" is {_UNIT} x {_UNIT} pixels; got {size[0]}x{size[1]}."
    )
  encoders = models.load_encoders(arguments.weights)
  progress = tqdm.tqdm(videos, desc="encode", unit="video")
  records = data.encode_videos(
    progress,
    *encoders,
    frames=frames,
    size=size,
    fps=arguments.fps,
    keep=_kept_folder(arguments) / _name_of(arguments.weights),
  )
  return encoders.embed([arguments.null_prompt])[0], records


def _kept_folder(arguments: argparse.Namespace) -> pathlib.Path:
  """Where encoded videos lie until all are."""
  return pathlib.Path(arguments.out, "wan_latents", f".{arguments.name}.part")


def _name_of(weights: str) -> str:
  """Names a folder after the encoders."""
  path = str(pathlib.Path(weights).absolute())
  return hashlib.sha256(path.encode()).hexdigest()[:16]


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm encode`."""
  command.add_argument(
    "source", nargs="+", metavar="SOURCE", help="a folder, or *.tar"
  )
  command.add_argument(
    "--out", required=True, help="the folder of datasets, made if missing"
  )
  command.add_argument("--name", required=True, help="of the new dataset")
  command.add_argument(
    "--weights", metavar="DIR", help="of Wan 2.1, original or diffusers"
  )
  command.add_argument(
    "--captions", metavar="FILE", help="*.csv or *.jsonl; else NAME.txt"
  )
  command.add_argument(
    "--size",
    type=_size,
    default=(480, 832),
    metavar="HEIGHTxWIDTH",
    help="videos are scaled and cropped to it (default: 480x832)",
  )
  command.add_argument(
    "--frames", type=int, default=81, help="of a clip (default: %(default)s)"
  )
  command.add_argument(
    "--fps", type=float, default=16.0, help="of a clip (default: %(default)s)"
  )
  command.add_argument(
    "--null-prompt",
    default="",
    help="what stands in for a dropped caption (default: empty)",
  )
  command.add_argument(
    "--null-embedding", metavar="FILE", help="its embeddings, *.pt or *.npy"
  )
  command.add_argument(
    "--max-bad",
    type=int,
    default=10,
    help="bad records to skip before giving up (default: %(default)s)",
  )
  command.add_argument(
    "--dtype",
    default="float16",
    help="to store, float16 or float32 (default: %(default)s)",
  )


def _size(text: str) -> tuple[int, int]:
  match = re.fullmatch(r"(\d+)x(\d+)", text)
  if match is None:
    raise argparse.ArgumentTypeError(
      f"must be HEIGHTxWIDTH, such as 480x832; got {text!r}"
    )
  return int(match[1]), int(match[2])
