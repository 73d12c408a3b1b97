"""`crcm sample` for Wan: arguments to settings, clips and files."""

import argparse
import contextlib
import fractions
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import tqdm

from crcm_jax import generation
from crcm_jax.chunks import ChunkPattern

EXAMPLES = """
With Wan's weights, or those of its distilled students:
  crcm sample --weights Wan2.1-T2V-1.3B --out a.mp4 --prompt "a cat on a roof"
  crcm sample --weights Wan2.1-T2V-1.3B --transformer student.safetensors \\
    --pattern 1,1 --steps 4,2 --prompts prompts.txt --out clips/
  crcm sample --random-weights 1.3B --pattern 3,3 --steps 4 --out speed.mp4

Frames are written as they are made; a file appears when it is whole, and
beside it NAME.json says what made it. A list of prompts goes on where it was
stopped."""

SIZES = {"480p": (480, 832), "720p": (720, 1280)}

_ONLY_WAN = (
  *("transformer", "prompt", "prompts", "image", "pattern", "solver"),
  *("mid_times", "noisy_context", "guidance"),
)


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments that samplers of trained digits do not have."""
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
  add("--prompt", help="what to show")
  add("--prompts", metavar="FILE", help="one a line; OUT is a folder")
  add("--negative-prompt", default="", help="what guidance leads away from")
  add("--image", metavar="FILE", help="the first frame")
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
  add(
    "--shift", type=float, default=3.0, help="of an ODE's times (%(default)s)"
  )
  add("--size", type=_size, default=SIZES["480p"], help="480p, 720p or WxH")
  add(
    "--force",
    action="store_true",
    help="sample otherwise than the weights say they were trained for",
  )
  add(
    "--dtype",
    choices=["bfloat16", "float32"],
    default="bfloat16",
    help="of weights and products (default: %(default)s)",
  )


def wants_wan(arguments: argparse.Namespace) -> bool:
  """Says whether Wan is to be sampled, and not a workdir.

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
      f" --weights DIR and --random-weights SIZE. {generation.WHERE_FROM}"
    )
  if arguments.source is None:
    return True
  given = [name for name in _ONLY_WAN if getattr(arguments, name) is not None]
  if given or len(arguments.steps or ()) > 1:
    what = f"--{given[0]}" if given else "several --steps"
    raise ValueError(
      f"{what.replace('_', '-')} must come with Wan's weights; SOURCE sets its"
      " own chunks and times, and --caption says what to show."
    )
  return False


def sample(arguments: argparse.Namespace, cache: pathlib.Path) -> None:
  """Makes one clip, or one for each prompt of a file.

  Args:
    arguments: of `add_arguments`, with `out`, `steps`, `frames`, `seed`, `fps`.
    cache: where embeddings of prompts are kept.
  """
  clips = list(_clips(arguments))  # before weights are read
  networks = _networks(arguments, cache)
  settings = _settings(arguments, networks)
  if not arguments.force:
    generation.check_trained(networks.about, settings)
  generator = generation.Generator(networks, settings)
  image = None
  if arguments.image is not None:
    image = generation.load_image(
      arguments.image, settings.height, settings.width
    )
  if arguments.prompts is not None:
    done = [generation.is_finished(clip, generator) for clip in clips]
    clips = [c for c, finished in zip(clips, done, strict=True) if not finished]
    print(f"{sum(done)} of {len(done)} clips are finished already.")
  if not clips:
    return
  prompts = [arguments.negative_prompt, *(clip.prompt for clip in clips)]
  null, *texts = networks.embed(prompts)
  for clip, text in zip(clips, texts, strict=True):
    with _bar(clip, settings.frames) as progress:
      timing = generation.write_clip(
        clip,
        generator,
        text[None],
        null[None],
        image=image,
        fps=arguments.fps or generation.FPS,
        progress=progress,
      )
    compiled = " (compiling included)" if clip is clips[0] else ""
    print(f"{clip.path}: {timing}{compiled}")


def _clips(arguments: argparse.Namespace) -> Iterator[generation.Clip]:
  make = lambda name, prompt: generation.Clip(
    path=pathlib.Path(name),
    prompt=prompt,
    seed=arguments.seed,
    negative_prompt=arguments.negative_prompt,
    image=arguments.image,
  )
  if arguments.prompts is None:
    if arguments.prompt is None and arguments.random_weights is None:
      raise ValueError(
        "`--prompt` must say what to show; got none. Give one, or a file of"
        " them with --prompts."
      )
    clip = make(arguments.out, arguments.prompt or "")
    if not clip.path.parent.is_dir():
      raise FileNotFoundError(
        "`--out` must lie in a folder that exists;"
        f" {str(clip.path.parent)!r} does not. Create it first."
      )
    yield clip
    return
  if arguments.prompt is not None:
    raise ValueError("`--prompt` must not come with --prompts; got both.")
  prompts = generation.read_prompts(arguments.prompts)
  folder = pathlib.Path(arguments.out)
  folder.mkdir(parents=True, exist_ok=True)
  for i, prompt in enumerate(prompts):
    yield make(folder / f"{i:04}.mp4", prompt)


def _networks(
  arguments: argparse.Namespace, cache: pathlib.Path
) -> generation.Networks:
  if arguments.random_weights is not None:
    return generation.random_networks(arguments.random_weights)
  return generation.load_networks(
    arguments.weights,
    transformer=arguments.transformer,
    group=arguments.group,
    dtype=jnp.dtype(arguments.dtype),
    cache=cache / "prompts",
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


@contextlib.contextmanager
def _bar(clip: generation.Clip, frames: int) -> Iterator[Any]:
  with tqdm.tqdm(
    total=frames, desc=clip.path.name, unit="frame", file=sys.stderr
  ) as bar:
    yield bar.update


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
