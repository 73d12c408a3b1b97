"""`crcm vbench-clips` and `crcm vbench-score`: to VBench and back."""

import argparse
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from crcm_jax import evaluation
from crcm_jax.commands import _wan, _workdir

CLIPS_EXAMPLES = """examples:
  crcm vbench-clips --weights Wan2.1-T2V-1.3B --prompts VBench_full_info.json \\
    --transformer student.safetensors --pattern 1,1 --steps 4,2 --out vbench
  crcm vbench-clips runs/digits --prompts prompts.txt --rewrite longer.json \\
    --out vbench

What is sampled, and how, is said as for `crcm sample`.
Writes OUT/videos/PROMPT-0.mp4 to PROMPT-4.mp4 for each prompt,
OUT/vbench_eval_info.json, which lists them, and OUT/run.json, which says what
made them. The same command goes on where it was stopped. Then let `vbench
evaluate --full_json_dir OUT/vbench_eval_info.json --videos_path OUT/videos`
score them, and `crcm vbench-score` read its results."""

SCORE_EXAMPLES = """examples:
  crcm vbench-score vbench evaluation_results/

RUN is what `crcm vbench-clips` wrote, RESULTS the `*_eval_results.json` of the
`vbench` tool, or folders with such files. Writes RUN/vbench_scores.json."""


def write_clips(arguments: argparse.Namespace) -> None:
  """Makes the clips that the `vbench` tool scores."""
  wan = _wan.is_meant(arguments)
  prompts = evaluation.read_vbench_prompts(arguments.prompts)
  rewrite = {}
  if arguments.rewrite is not None:
    rewrite = evaluation.read_rewrite(arguments.rewrite)
  if wan:
    words = [rewrite.get(prompt, prompt) for prompt in prompts.prompts]
    make, record = _wan_clip_maker(arguments, words)
  else:
    (steps,) = arguments.steps or (None,)
    make, tell = _workdir.clip_maker(arguments.source, steps, arguments.frames)
    record = tell()
  count = len(prompts.prompts) * arguments.seeds
  with tqdm.tqdm(total=count, desc="vbench", unit="clip") as progress:
    info = evaluation.write_vbench_clips(
      make,
      prompts,
      arguments.out,
      record=record,
      seeds=range(arguments.seeds),
      fps=arguments.fps,
      rewrite=rewrite,
      on_clip=lambda path: progress.update(),
    )
  print(info)


def _wan_clip_maker(
  arguments: argparse.Namespace, prompts: Sequence[str]
) -> tuple[evaluation.MakeClip, dict[str, Any]]:
  """Returns what makes clips of (prompt, seed), and what it is made of."""
  generator = _wan.load(arguments)
  networks, negative = generator.networks, arguments.negative_prompt
  networks.prepare([negative, *prompts])
  null = networks.embed([negative])

  def make(prompt: str, seed: int) -> Iterator[np.ndarray]:
    return generator(networks.embed([prompt]), null, seed=seed)

  return make, {
    "checkpoint_sha256": networks.weights_hash,
    "negative_prompt": negative,
    **generator.settings.record(),
  }


def score(arguments: argparse.Namespace) -> None:
  """Computes VBench's total, quality and semantic scores of its results."""
  folder = pathlib.Path(arguments.run_dir)
  if not (folder / "vbench_eval_info.json").exists():
    raise ValueError(
      "RUN must be a finished run of `crcm vbench-clips`;"
      f" {str(folder)!r} has no vbench_eval_info.json."
    )
  dimensions = evaluation.read_vbench_results(arguments.results)
  scores = evaluation.vbench_scores(dimensions)._asdict()
  run = json.loads((folder / "run.json").read_text())
  path = folder / "vbench_scores.json"
  content = {**scores, "dimensions": dimensions, "run": run}
  path.write_text(json.dumps(content, indent=2) + "\n")
  for name, value in (scores | dimensions).items():
    print(f"{name:24}{100 * value:7.2f} %")
  print(path)


def add_clips_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm vbench-clips`."""
  _wan.add_source(command)
  command.add_argument(
    "--prompts",
    required=True,
    metavar="FILE",
    help="VBench_full_info.json, or a text with a prompt a line",
  )
  command.add_argument("--out", required=True, help="the folder")
  command.add_argument(
    "--seeds", type=int, default=5, help="clips a prompt (default: %(default)s)"
  )
  command.add_argument("--fps", type=float, default=16.0, help="of the files")
  command.add_argument(
    "--rewrite",
    metavar="FILE.json",
    help="{prompt: what to give to the model instead}",
  )
  _wan.add_arguments(command)


def add_score_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm vbench-score`."""
  command.add_argument("run_dir", metavar="RUN", help="of `crcm vbench-clips`")
  command.add_argument(
    "results", nargs="+", metavar="RESULTS", help="of the `vbench` tool"
  )
