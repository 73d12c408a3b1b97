"""Clips for VBench: what the tool reads, and what it takes to repeat them.

  OUT/videos/PROMPT-0.mp4 ... PROMPT-4.mp4    one clip for each seed
  OUT/vbench_eval_info.json                   prompts, dimensions and clips
  OUT/run.json                                what the clips were made of

The same call goes on where it was stopped.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from crcm_jax.evaluation import _video, _video_writer

MakeClip: TypeAlias = Callable[[str, int], np.ndarray | Iterator[np.ndarray]]
"""Makes a clip of (prompt, seed): uint8 or floats in [-1, 1], [f, h, w, c]; or
pieces of one, uint8 [f, h, w, 3], which are written as they come."""

CUSTOM_DIMENSIONS = (
  "subject_consistency",
  "background_consistency",
  "motion_smoothness",
  "dynamic_degree",
  "aesthetic_quality",
  "imaging_quality",
)
"""Dimensions that VBench scores for prompts that are not its own."""

# File systems allow names of 255 bytes; an unfinished file's is longer.
_NAME_BYTES = 230


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFile:
  """The prompts to make clips of.

  Attributes:
    entries: as the tool knows them, with `prompt_en` and `dimension`.
    sha256: of the file.
  """

  entries: tuple[Mapping[str, Any], ...]
  sha256: str

  @property
  def prompts(self) -> list[str]:
    """The prompts, each once."""
    return list(dict.fromkeys(entry["prompt_en"] for entry in self.entries))


def read_vbench_prompts(path: str | os.PathLike[str]) -> PromptFile:
  """Reads a file of prompts.

  Args:
    path: VBench's `VBench_full_info.json`, which says what each prompt is for;
      or any text with one prompt a line, of which VBench can score
      `CUSTOM_DIMENSIONS` only.

  Returns:
    The prompts.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if a line is empty, an entry lacks a key, or a prompt cannot be
      the name of a file.
  """
  path = pathlib.Path(path)
  raw = path.read_bytes()
  read = _json_entries if path.suffix == ".json" else _line_entries
  entries = tuple(read(raw.decode(), path))
  for entry in entries:
    _check_prompt(entry["prompt_en"], path)
  return PromptFile(entries=entries, sha256=hashlib.sha256(raw).hexdigest())


def _json_entries(text: str, path: pathlib.Path) -> Sequence[dict[str, Any]]:
  try:
    entries = json.loads(text)
  except ValueError as error:
    raise ValueError(
      f"`path` must be JSON; {path} is not ({error})."
    ) from error
  if not isinstance(entries, list) or not entries:
    raise ValueError(f"`path` must hold a list of prompts; {path} does not.")
  for i, entry in enumerate(entries):
    if not isinstance(entry, dict) or {"prompt_en", "dimension"} - set(entry):
      raise ValueError(
        f"`path` must say `prompt_en` and `dimension` of each prompt; entry {i}"
        f" of {path} is {entry!r}."
      )
  return entries


def _line_entries(text: str, path: pathlib.Path) -> list[dict[str, Any]]:
  lines = text.removesuffix("\n").split("\n")
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      raise ValueError(
        f"`path` must hold a prompt in each line; line {number} of {path} is"
        " empty. Remove it."
      )
  return [
    dict(prompt_en=line.strip(), dimension=list(CUSTOM_DIMENSIONS))
    for line in lines
  ]


def _check_prompt(prompt: Any, path: pathlib.Path) -> None:
  """Raises, if clips cannot be named after a prompt, as VBench wants it."""
  name = f"{prompt}-00.mp4"
  if not isinstance(prompt, str) or "/" in name or "\0" in name:
    problem = "has a '/'"
  elif not prompt.strip() or prompt.startswith("."):
    problem = "is empty or begins with '.'"
  elif len(name.encode()) > _NAME_BYTES:
    problem = f"is longer than {_NAME_BYTES - len('-00.mp4')} bytes"
  else:
    return
  raise ValueError(
    f"`path` must hold prompts that can name files, for VBench finds clips by"
    f" them; {prompt!r} in {path} {problem}. Shorten it, and give the model"
    " your wording by `rewrite`."
  )


def read_rewrite(path: str | os.PathLike[str]) -> dict[str, str]:
  """Reads other wordings of prompts.

  Args:
    path: a JSON object, {prompt: what to give to the model instead}.

  Raises:
    ValueError: if it is something else.
  """
  try:
    rewrite = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  except ValueError:
    rewrite = None
  if not isinstance(rewrite, dict) or not all(
    isinstance(text, str) and text for text in rewrite.values()
  ):
    raise ValueError(
      f"`path` must hold an object {{prompt: text}}; {path} does not."
    )
  return rewrite


def write_vbench_clips(
  make: MakeClip,
  prompts: PromptFile,
  out: str | os.PathLike[str],
  *,
  record: Mapping[str, Any],
  seeds: Sequence[int] = (0, 1, 2, 3, 4),
  fps: float = 16.0,
  rewrite: Mapping[str, str] | None = None,
  on_clip: Callable[[pathlib.Path], object] | None = None,
) -> pathlib.Path:
  """Makes the clips that are not there yet, then the file that lists them.

  Args:
    make: makes a clip of a prompt and a seed.
    prompts: of `read_vbench_prompts`.
    out: the folder; made if missing.
    record: how `make` does it, as JSON values: the checkpoint's hash, chunk
      pattern, schedule. It is kept in `run.json`, with the prompts' hash and
      the seeds; clips of another record are never mixed in.
    seeds: of the clips of each prompt; VBench wants five.
    fps: frames a second of the files.
    rewrite: what to give to `make` instead of some prompts, such as longer
      wordings; files are named after the prompts all the same.
    on_clip: called with each clip's path when it is there, for progress.

  Returns:
    The path of `vbench_eval_info.json`, which lists all clips.

  Raises:
    ValueError: if `out` holds clips of another record, `seeds` is empty, or
      `rewrite` rewords what is no prompt.
  """
  if not seeds:
    raise ValueError("`seeds` must hold at least one; VBench wants five.")
  out, rewrite = pathlib.Path(out), dict(rewrite or {})
  record = {
    **record,
    "prompts_sha256": prompts.sha256,
    "seeds": list(seeds),
    "fps": fps,
  }
  if unknown := sorted(rewrite.keys() - set(prompts.prompts)):
    raise ValueError(
      f"`rewrite` must reword prompts of the file; {unknown[:3]} are none."
    )
  if rewrite:
    text = json.dumps(rewrite, sort_keys=True)
    record["rewrite_sha256"] = hashlib.sha256(text.encode()).hexdigest()
  videos = out / "videos"
  videos.mkdir(parents=True, exist_ok=True)
  _claim(out / "run.json", record)
  for leftover in videos.glob(".*.unfinished"):
    leftover.unlink()  # VBench looks at every file in the folder
  for prompt in prompts.prompts:
    for i, seed in enumerate(seeds):
      path = videos / f"{prompt}-{i}.mp4"
      if not path.exists():
        _write(path, make(rewrite.get(prompt, prompt), seed), fps)
      if on_clip is not None:
        on_clip(path)
  info = out / "vbench_eval_info.json"
  _video.write_whole(info, _as_bytes(_eval_info(prompts, videos, len(seeds))))
  return info


def _write(
  path: pathlib.Path, clip: np.ndarray | Iterator[np.ndarray], fps: float
) -> None:
  if isinstance(clip, np.ndarray):
    _video.write_video(path, clip, fps=fps, min_size=1)
    return
  with _video_writer.video_writer(path, fps=fps) as write:
    for frames in clip:
      write(frames)


def _eval_info(
  prompts: PromptFile, videos: pathlib.Path, count: int
) -> list[dict[str, Any]]:
  """Adds to each entry the list of its clips."""
  paths = lambda prompt: [
    str(videos.absolute() / f"{prompt}-{i}.mp4") for i in range(count)
  ]
  return [
    {**entry, "video_list": paths(entry["prompt_en"])}
    for entry in prompts.entries
  ]


def _claim(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Writes what the clips are made of, or checks that it is the same."""
  record = json.loads(json.dumps(record))  # tuples become lists
  if not path.exists():
    _video.write_whole(path, _as_bytes(record))
    return
  before = json.loads(path.read_text())
  keys = sorted(before.keys() | record.keys())
  changed = [
    f"{key} was {before.get(key)!r}, is {record.get(key)!r}"
    for key in keys
    if before.get(key) != record.get(key)
  ]
  if changed:
    raise ValueError(
      f"`out` must hold clips of the same run; in {path} {'; '.join(changed)}."
      " Choose another folder."
    )


def _as_bytes(value: Any) -> bytes:
  return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
