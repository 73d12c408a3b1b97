"""`crcm vbench-clips` and `crcm vbench-score`: to VBench and back."""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tqdm

from crcm_jax import evaluation

CLIPS_EXAMPLES = """examples:
  crcm vbench-clips runs/wan/self_forcing VBench_full_info.json --out vbench
  crcm vbench-clips SOURCE prompts.txt --out vbench --rewrite longer.json

Writes OUT/videos/PROMPT-0.mp4 to PROMPT-4.mp4 for each prompt,
OUT/vbench_eval_info.json, which lists them, and OUT/run.json, which says what
made them. The same command goes on where it was stopped. Then let `vbench
evaluate --full_json_dir OUT/vbench_eval_info.json --videos_path OUT/videos`
score them, and `crcm vbench-score` read its results."""

SCORE_EXAMPLES = """examples:
  crcm vbench-score vbench evaluation_results/

RUN is what `crcm vbench-clips` wrote, RESULTS the `*_eval_results.json` of the
`vbench` tool, or folders with such files. Writes RUN/vbench_scores.json."""


def write_clips(
  arguments: argparse.Namespace,
  make: evaluation.MakeClip,
  record: Mapping[str, Any],
) -> None:
  """Makes the clips that the `vbench` tool scores.

  Args:
    arguments: of the command line.
    make: makes a clip of a prompt and a seed.
    record: how it does; see `evaluation.write_vbench_clips`.
  """
  prompts = evaluation.read_vbench_prompts(arguments.prompts)
  rewrite = None
  if arguments.rewrite is not None:
    rewrite = evaluation.read_rewrite(arguments.rewrite)
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
  command.add_argument("source", metavar="SOURCE", help="as of `crcm sample`")
  command.add_argument(
    "prompts",
    metavar="PROMPTS",
    help="VBench_full_info.json, or a text with a prompt a line",
  )
  command.add_argument("--out", required=True, help="the folder")
  command.add_argument(
    "--seeds", type=int, default=5, help="clips a prompt (default: %(default)s)"
  )
  command.add_argument(
    "--steps", type=int, help="denoising steps a chunk; the most by default"
  )
  command.add_argument(
    "--frames", type=int, help="latent frames; as many as in training"
  )
  command.add_argument("--fps", type=float, default=16.0, help="of the files")
  command.add_argument(
    "--rewrite",
    metavar="FILE.json",
    help="{prompt: what to give to the model instead}",
  )


def add_score_arguments(command: argparse.ArgumentParser) -> None:
  """Adds the arguments of `crcm vbench-score`."""
  command.add_argument("run_dir", metavar="RUN", help="of `crcm vbench-clips`")
  command.add_argument(
    "results", nargs="+", metavar="RESULTS", help="of the `vbench` tool"
  )
