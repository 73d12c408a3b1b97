"""Wan's networks and how to sample them, of the words of a command."""

import argparse
import fractions
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from crcm_jax import generation, models
from crcm_jax.chunks import ChunkPattern
from crcm_jax.commands import CACHE

SIZES = {"480p": (480, 832), "720p": (720, 1280)}

_USUAL = dict(
  transformer=None,
  group=None,
  negative_prompt="",
  pattern=None,
  solver=None,
  mid_times=None,
  noisy_context=None,
  guidance=None,
  shift=3.0,
  size=SIZES["480p"],
  force=False,
  dtype="bfloat16",
)
"""What is not given; a workdir has its own chunks, times and sizes."""


def add_source(command: argparse.ArgumentParser) -> None:
  """Adds what to sample, and in how many steps and frames."""
  command.add_argument(
    "source", metavar="SOURCE", nargs="?", help="of `crcm train`, to sample"
  )
  command.add_argument(
    "--steps",
    type=steps,
    metavar="N[,N...]",
    help="denoising steps a chunk, the last number for all further ones; the"
    " most by default, for Wan 4 or 50",
  )
  command.add_argument(
    "--frames",
    type=int,
    help="latent frames, as many as in training; for Wan RGB frames, 81",
  )


def add_arguments(command: argparse.ArgumentParser) -> Any:
  """Adds the arguments that samplers of workdirs do not have.

  Returns:
    Their group.
  """
  wan = command.add_argument_group("Wan")
  add = wan.add_argument
  add("--weights", metavar="DIR", help="transformer, autoencoder, text encoder")
  add("--transformer", metavar="FILE", help="in place of that of DIR")
  add("--group", help="which network of FILE, such as generator_ema")
  add(
    "--random-weights",
    choices=list(generation.RANDOM),
    help="of such a size, to measure speed",
  )
  add("--negative-prompt", help="what guidance leads away from (empty)")
  add(
    "--pattern",
    type=pattern,
    metavar="FIRST,REST",
    help="latent frames of the first and of each later chunk, such as 1,1; that"
    " of the weights by default; without any, the whole video at once",
  )
  add(
    "--solver",
    choices=["few_step", "euler", "unipc"],
    help="few_step with chunks, unipc without, by default",
  )
  add(
    "--mid-times",
    nargs="+",
    type=_times,
    metavar="T,T,...",
    help="times between the first and 0, for each entry of --steps; - for none",
  )
  add(
    "--noisy-context",
    nargs="?",
    type=int,
    const=1,
    metavar="CHUNK",
    help="commit chunks as their last step saw them, from CHUNK (1) on",
  )
  add("--guidance", type=float, help="scale; 1 is none")
  add("--shift", type=float, help="of an ODE's times (%(default)s)")
  add("--size", type=_size, help="480p (by default), 720p or WxH")
  add(
    "--force",
    action="store_true",
    help="sample otherwise than the weights say they were trained for",
  )
  add(
    "--dtype",
    choices=["bfloat16", "float32"],
    help="of weights and products (default: %(default)s)",
  )
  command.set_defaults(**_USUAL)
  return wan


def is_meant(arguments: argparse.Namespace, also: Sequence[str] = ()) -> bool:
  """Says whether Wan is to be sampled, and not a workdir.

  Args:
    arguments: of `add_source` and `add_arguments`.
    also: further names of arguments that only Wan has, None if not given.

  Raises:
    ValueError: if both are named, or neither; if a workdir is to be sampled in
      a way that only Wan can be.
  """
  named = [
    arguments.source,
    arguments.weights,
    arguments.random_weights,
  ]
  if sum(name is not None for name in named) != 1:
    raise ValueError(
      "name what to sample: one of SOURCE (a workdir of `crcm train`),"
      " --weights DIR and --random-weights SIZE, which only shows the speed."
      f" DIR holds: {models.files_of()}. {models.WHERE_FROM}"
    )
  if arguments.source is None:
    return True
  usual = _USUAL | dict.fromkeys(also)
  given = [name for name in usual if getattr(arguments, name) != usual[name]]
  if given or len(arguments.steps or ()) > 1:
    what = f"--{given[0]}" if given else "several --steps"
    raise ValueError(
      f"{what.replace('_', '-')} must come with Wan's weights; SOURCE sets its"
      " own chunks and times, and --caption says what to show."
    )
  return False


def load(arguments: argparse.Namespace) -> generation.Generator:
  """Loads the networks, and checks that they can be sampled as asked for.

  Raises:
    FileNotFoundError: if a part of the weights is missing.
    ValueError: if a file is broken, or settings do not fit each other, the
      networks or what these were trained for.
  """
  networks = _networks(arguments)
  settings = _settings(arguments, networks)
  if not arguments.force:
    generation.check_trained(networks.about, settings)
  return generation.Generator(networks, settings)


def _networks(arguments: argparse.Namespace) -> generation.Networks:
  if arguments.random_weights is not None:
    return generation.random_networks(arguments.random_weights)
  return generation.load_networks(
    arguments.weights,
    transformer=arguments.transformer,
    group=arguments.group,
    dtype=jnp.dtype(arguments.dtype),
    cache=CACHE / "prompts",
  )


def _settings(
  arguments: argparse.Namespace, networks: generation.Networks
) -> generation.Settings:
  """Reads the settings; the networks may say which chunks they know."""
  height, width = arguments.size
  mid_times = arguments.mid_times
  return generation.Settings(
    frames=81 if arguments.frames is None else arguments.frames,
    height=height,
    width=width,
    pattern=arguments.pattern or generation.trained_pattern(networks.about),
    solver=arguments.solver,
    steps=arguments.steps,
    mid_times=None if mid_times is None else tuple(mid_times),
    noisy_context=arguments.noisy_context,
    guidance=arguments.guidance,
    shift=arguments.shift,
  )


def pattern(text: str) -> ChunkPattern:
  """Reads `FIRST,REST`."""
  first, _, rest = text.partition(",")
  return ChunkPattern(int(first), int(rest))


def steps(text: str) -> tuple[int, ...]:
  """Reads `4` or `4,2`."""
  return tuple(int(word) for word in text.split(","))


def _times(text: str) -> tuple[float, ...]:
  if text == "-":
    return ()
  return tuple(float(fractions.Fraction(word)) for word in text.split(","))


def _size(text: str) -> tuple[int, int]:
  """Reads `480p`, or `832x480`, into rows and columns."""
  if text in SIZES:
    return SIZES[text]
  width, _, height = text.partition("x")
  return int(height), int(width)
