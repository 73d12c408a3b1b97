"""VBench's total, quality and semantic scores, from its result files.

Each dimension's score s in [0, 1] is put on the range [low, high] that VBench
has found for it, and dimensions are averaged with weights w:

  quality, semantic = sum_i w_i (s_i - low_i) / (high_i - low_i) / sum_i w_i
  total = (4 quality + semantic) / 5

References:
  Huang et al., "VBench: Comprehensive Benchmark Suite for Video Generative
  Models", CVPR 2024, https://arxiv.org/abs/2311.17982; ranges and weights are
  those of its leaderboard, https://github.com/Vchitect/VBench.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Dimension(NamedTuple):
  """How a dimension enters the scores."""

  low: float = 0.0
  high: float = 1.0
  weight: float = 1.0


QUALITY = {
  "subject_consistency": Dimension(0.1462),
  "background_consistency": Dimension(0.2615),
  "temporal_flickering": Dimension(0.6293),
  "motion_smoothness": Dimension(0.706, 0.9975),
  "dynamic_degree": Dimension(weight=0.5),
  "aesthetic_quality": Dimension(),
  "imaging_quality": Dimension(),
}
"""Dimensions of the quality score, which need no prompt."""

SEMANTIC = {
  "object_class": Dimension(),
  "multiple_objects": Dimension(),
  "human_action": Dimension(),
  "color": Dimension(),
  "spatial_relationship": Dimension(),
  "scene": Dimension(high=0.8222),
  "appearance_style": Dimension(0.0009, 0.2855),
  "temporal_style": Dimension(high=0.364),
  "overall_consistency": Dimension(high=0.364),
}
"""Dimensions of the semantic score."""

VBENCH_DIMENSIONS = (*QUALITY, *SEMANTIC)
"""All dimensions, by the names that the tool gives them."""

_QUALITY_SHARE = 4 / 5


class VBenchScores(NamedTuple):
  """The three scores, usually quoted in percent; here 1 is the best."""

  total: float
  quality: float
  semantic: float


def vbench_scores(dimensions: Mapping[str, float]) -> VBenchScores:
  """Computes the scores of a model.

  Args:
    dimensions: the score of each of `VBENCH_DIMENSIONS`, in [0, 1], as the
      tool writes them.

  Returns:
    The scores.

  Raises:
    ValueError: if a dimension is missing or unknown, or a score is no share;
      scores without a dimension cannot be compared with others.

  Example:
    >>> vbench_scores({name: 0.2 for name in VBENCH_DIMENSIONS}).semantic > 0.2
    True
  """
  wrong = sorted(set(dimensions) - set(VBENCH_DIMENSIONS))
  missing = [name for name in VBENCH_DIMENSIONS if name not in dimensions]
  if wrong or missing:
    raise ValueError(
      "`dimensions` must be VBench's sixteen; missing"
      f" {missing or 'none'}, unknown {wrong or 'none'}. Evaluate all of them:"
      " totals over fewer mean something else."
    )
  for name, score in dimensions.items():
    if not 0 <= score <= 1:
      raise ValueError(
        f"`dimensions[{name!r}]` must lie in [0, 1]; got {score}. Divide"
        " percentages by 100."
      )
  quality = _average(dimensions, QUALITY)
  semantic = _average(dimensions, SEMANTIC)
  total = _QUALITY_SHARE * quality + (1 - _QUALITY_SHARE) * semantic
  return VBenchScores(total, quality, semantic)


def _average(
  dimensions: Mapping[str, float], parts: Mapping[str, Dimension]
) -> float:
  total = sum(
    part.weight * (dimensions[name] - part.low) / (part.high - part.low)
    for name, part in parts.items()
  )
  return total / sum(part.weight for part in parts.values())


def read_vbench_results(
  paths: Iterable[str | os.PathLike[str]],
) -> dict[str, float]:
  """Reads the score of each dimension from the tool's result files.

  Args:
    paths: files `*_eval_results.json`, each with one or more dimensions, or
      folders that hold such files.

  Returns:
    The scores by dimension.

  Raises:
    FileNotFoundError: if there is no such file, or none in a folder.
    ValueError: if a file is no result, or two contradict each other.
  """
  found: dict[str, float] = {}
  for path in _result_files(map(pathlib.Path, paths)):
    for name, score in _read_results(path).items():
      if found.setdefault(name, score) != score:
        raise ValueError(
          f"`paths` must agree; {path} says {score} of {name!r}, an earlier"
          f" file {found[name]}. Name the results of one run."
        )
  return found


def _result_files(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  files = []
  for path in paths:
    inside = sorted(path.glob("*_eval_results.json")) if path.is_dir() else []
    if path.is_dir() and not inside:
      raise FileNotFoundError(
        f"`paths` must be results of VBench; {path} has no"
        " *_eval_results.json. Run `vbench evaluate` first."
      )
    files += inside or [path]
  return files


def _read_results(path: pathlib.Path) -> dict[str, float]:
  """Reads {dimension: [score, scores of the single videos]}."""
  try:
    content: Any = json.loads(path.read_text())
    return {name: float(entry[0]) for name, entry in content.items()}
  except (ValueError, AttributeError, TypeError, LookupError) as error:
    raise ValueError(
      f"`paths` must be results of VBench, {{dimension: [score, ...]}}; {path}"
      f" is not ({error!r}). Copy it again."
    ) from error
