"""`crcm sample`: words to clips and files."""

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import tqdm

from crcm_jax import evaluation, generation
from crcm_jax.commands import _wan, _workdir

EXAMPLES = """examples:
  crcm sample runs/digits --out clip.gif --caption "seven moving left, fast"
  crcm sample runs/digits/self_forcing:live@300 --out clip.mp4 --steps 2
  crcm sample experiments/moving_digits/weights/causal.safetensors --out a.png

SOURCE is an experiment (its last stage), a stage's workdir, or a safetensors
file, with [:ema|:live][@STEP]. Chunks, schedules and context come from it.

With Wan's weights, or those of its distilled students:
  crcm sample --weights Wan2.1-T2V-1.3B --out a.mp4 --prompt "a cat on a roof"
  crcm sample --weights Wan2.1-T2V-1.3B --transformer student.safetensors \\
    --pattern 1,1 --steps 4,2 --prompts prompts.txt --out clips/
  crcm sample --random-weights 1.3B --pattern 3,3 --steps 4 --out speed.mp4

Frames are written as they are made; a file appears when it is whole, and
beside it NAME.json says what made it. A list of prompts goes on where it was
stopped. With random weights, the speed is measured on one more clip."""

_CAPTION = "seven moving left and up, fast; two moving down"


def sample(arguments: argparse.Namespace) -> None:
  """Generates one clip, or one for each prompt of a file, as videos."""
  if _wan.is_meant(arguments, also=("prompt", "prompts", "image")):
    _sample_wan(arguments)
    return
  (steps,) = arguments.steps or (None,)
  make, _ = _workdir.clip_maker(arguments.source, steps, arguments.frames)
  video = make(arguments.caption or _CAPTION, arguments.seed)
  path = evaluation.write_video(arguments.out, video, fps=arguments.fps or 8.0)
  print(path)


def _sample_wan(arguments: argparse.Namespace) -> None:
  clips = list(_clips(arguments))  # before weights are read
  generator = _wan.load(arguments)
  networks, settings = generator.networks, generator.settings
  image = None
  if arguments.image is not None:
    image = generation.load_image(
      arguments.image, settings.height, settings.width
    )
  if arguments.prompts is not None:
    done = [generation.is_finished(clip, generator) for clip in clips]
    clips = [c for c, finished in zip(clips, done, strict=True) if not finished]
    print(f"{sum(done)} of {len(done)} clips are finished already.")
  negative = arguments.negative_prompt
  if clips:
    networks.prepare([negative, *(clip.prompt for clip in clips)])
  for clip in clips:
    text, null = networks.embed([clip.prompt]), networks.embed([negative])
    with _bar(clip, settings.frames) as progress:
      timing = generation.write_clip(
        clip,
        generator,
        text,
        null,
        image=image,
        fps=arguments.fps or generation.FPS,
        progress=progress,
      )
    compiled = " (compiling included)" if clip is clips[0] else ""
    print(f"{clip.path}: {timing}{compiled}")
  if clips and arguments.random_weights is not None:
    text, null = networks.embed([""]), networks.embed([negative])
    speed = generation.measure_speed(generator, text, null)
    print(f"{arguments.random_weights}, compiled: {speed}")


def _clips(arguments: argparse.Namespace) -> Iterator[generation.Clip]:
  make = lambda name, prompt: generation.Clip(
    path=pathlib.Path(name),
    prompt=prompt,
    seed=arguments.seed,
    negative_prompt=arguments.negative_prompt,
    image=arguments.image,
  )
  if arguments.caption is not None:
    raise ValueError(
      "`--caption` must come with SOURCE; say what Wan shows with --prompt."
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


@contextlib.contextmanager
def _bar(clip: generation.Clip, frames: int) -> Iterator[Any]:
  with tqdm.tqdm(
    total=frames, desc=clip.path.name, unit="frame", file=sys.stderr
  ) as bar:
    yield bar.update


def add_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm sample`."""
  _wan.add_source(command)
  add = command.add_argument
  add("--out", required=True, help="the video: *.mp4, *.gif or *.png")
  add("--caption", help=f"what to show (default: {_CAPTION!r})")
  add("--seed", type=int, default=0, help="of the noise")
  add("--fps", type=float, help="frames a second; 8, for Wan 16")
  add = _wan.add_arguments(command).add_argument
  add("--prompt", help="what to show")
  add("--prompts", metavar="FILE", help="one a line; OUT is a folder")
  add("--image", metavar="FILE", help="the first frame")
