"""`crcm convert`: weights from and to the files of PyTorch projects."""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp

from crcm_jax import models
from crcm_jax.commands import _wan

EXAMPLES = """examples:
  crcm convert Wan2.1-T2V-1.3B/ --out wan.safetensors --dtype bfloat16
  crcm convert dmd.pt --group generator_ema --pattern 3,3 --out a.safetensors
  crcm convert a.safetensors --layout diffusers --out model.safetensors

SOURCE is a Wan transformer, autoencoder or text encoder: a .safetensors, .pt
or .pth file, the index of shards, a folder with one of these, in the original
layout or that of diffusers; or a file of ours. What it says of itself (stage,
chunk pattern, schedules) goes along. No code in a pickle is run."""


def convert(arguments: argparse.Namespace) -> None:
  """Converts weights from and to the files of PyTorch projects."""
  out = pathlib.Path(arguments.out)
  out.parent.mkdir(parents=True, exist_ok=True)
  about: dict[str, Any] = {}
  if arguments.about is not None:
    about |= json.loads(pathlib.Path(arguments.about).read_text())
  if arguments.stage is not None:
    about["stage"] = arguments.stage
  if arguments.pattern is not None:
    about["pattern"] = dataclasses.asdict(arguments.pattern)
  config = None
  if arguments.network is not None:
    entries = json.loads(pathlib.Path(arguments.network).read_text())
    config = models.WanConfig.from_wan(entries)
  models.convert(
    arguments.source,
    out,
    layout=arguments.layout,
    config=config,
    group=arguments.group,
    dtype=arguments.dtype,
    about=about,
    force=arguments.force,
  )
  print(out)


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm convert`."""
  command.add_argument("source", metavar="SOURCE", help="what to convert")
  command.add_argument("--out", required=True, help="the file *.safetensors")
  command.add_argument(
    "--layout",
    default="crcm",
    choices=("crcm", "wan", "rcm", "diffusers"),
    help="of OUT (default: %(default)s)",
  )
  command.add_argument(
    "--group", help="which of several networks, such as generator_ema"
  )
  command.add_argument(
    "--dtype", type=jnp.dtype, help="to store; as it is by default"
  )
  command.add_argument("--stage", help="that made the weights; kept in OUT")
  command.add_argument(
    "--pattern",
    type=_wan.pattern,
    metavar="FIRST,REST",
    help="latent frames of the first and of each later chunk; kept in OUT",
  )
  command.add_argument(
    "--about",
    metavar="FILE.json",
    help="more to keep in OUT, such as `sampling`, the schedules",
  )
  command.add_argument(
    "--network",
    metavar="config.json",
    help="of the original, where heads are not 128 wide",
  )
  command.add_argument(
    "--force",
    action="store_true",
    help="let these contradict what SOURCE says of itself",
  )
