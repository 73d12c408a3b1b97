"""Whether weights are sampled as they were trained to be.

A student that is given other chunks or other times than those of its training
makes poor video without any error; so what its file says is held against what
is asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from crcm_jax.chunks import ChunkPattern
from crcm_jax.generation._settings import Settings


def trained_pattern(about: Mapping[str, Any]) -> ChunkPattern | None:
  """Returns the chunks that weights were trained for, if their file says."""
  pattern = about.get("pattern")
  return None if pattern is None else ChunkPattern(**pattern)


def check_trained(about: Mapping[str, Any], settings: Settings) -> None:
  """Refuses settings that contradict what a file of weights says of itself.

  Args:
    about: what it says: its chunk `pattern`; of a student its `sampling`, with
      `mid_times` by the number of steps, `context` and `context_start`. What
      it does not mention is not checked.
    settings: how the weights shall be sampled.

  Raises:
    ValueError: if they differ; all differences are named.
  """
  faults = []
  pattern = trained_pattern(about)
  if pattern not in (None, settings.pattern):
    faults.append(f"their pattern is {pattern}, not {settings.pattern}")
  sampling = about.get("sampling") or {}
  if settings.solver == "few_step":
    faults += _schedule_faults(sampling, settings)
  if faults:
    raise ValueError(
      "`settings` must be those that the weights were trained for: "
      + "; ".join(faults)
      + ". Sample as they say, or use --force."
    )


def _schedule_faults(
  sampling: Mapping[str, Any], settings: Settings
) -> list[str]:
  faults = []
  if "context" in sampling:
    noisy = sampling["context"] == "last_step"
    start = sampling.get("context_start", 0) if noisy else None
    if start != settings.noisy_context:
      faults.append(
        f"the noisy context starts at chunk {start}, not"
        f" {settings.noisy_context} (None is a clean one)"
      )
  if "mid_times" in sampling:
    asked = [times[1:-1] for times in settings.schedules]
    known = sampling["mid_times"].get(str(len(asked[0]) + 1))
    if known is None:
      steps = ", ".join(sampling["mid_times"])
      faults.append(f"they have times for {steps} steps")
    elif not _same(known, asked):
      faults.append(f"times between the first and 0 are {known}, not {asked}")
  return faults


def _same(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> bool:
  """Compares times of chunks, the last of which serve all further ones."""
  at = lambda rows, i: tuple(rows[min(i, len(rows) - 1)])
  close = lambda x, y: (
    len(x) == len(y)
    and all(abs(s - t) < 1e-6 for s, t in zip(x, y, strict=True))
  )
  return all(close(at(a, i), at(b, i)) for i in range(max(len(a), len(b))))
