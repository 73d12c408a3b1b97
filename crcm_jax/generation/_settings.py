"""What a video shall be and how it is made, checked before anything runs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from crcm_jax import models, sampling
from crcm_jax.chunks import ChunkPattern

Solver = Literal["few_step", "euler", "unipc"]

_GUIDANCE = {"few_step": 1.0, "euler": 3.0, "unipc": 5.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Size, chunks and schedules of a video.

  Fields that are None take what is usual for the others.

  Attributes:
    frames: RGB frames, 4k + 1.
    height: rows of a frame.
    width: columns of a frame.
    pattern: how latent frames form chunks; None is the bidirectional network.
    solver: "few_step" for a distilled student; "euler" or "unipc" follow the
      ODE of a diffusion model, chunk by chunk only the former.
    steps: of each chunk; the last entry serves all further ones. An ODE takes
      as many in each.
    mid_times: times between the first and 0, for each entry of `steps`; None
      takes `sampling.MID_TIMES`.
    noisy_context: first chunk that later ones see as noisy as its last step
      saw it; None shows all chunks clean.
    guidance: scale of classifier-free guidance; 1 is none.
    shift: moves the times of an ODE towards noise.

  Raises:
    ValueError: if these do not fit each other.
  """

  frames: int = 81
  height: int = 480
  width: int = 832
  pattern: ChunkPattern | None = None
  solver: Solver | None = None
  steps: tuple[int, ...] | None = None
  mid_times: tuple[tuple[float, ...], ...] | None = None
  noisy_context: int | None = None
  guidance: float | None = None
  shift: float = 3.0

  def __post_init__(self):
    fill = functools.partial(object.__setattr__, self)
    causal = self.pattern is not None
    if self.solver is None:
      fill("solver", "few_step" if causal else "unipc")
    if self.solver not in _GUIDANCE:
      raise ValueError(
        f"`solver` must be one of {list(_GUIDANCE)}; got {self.solver!r}."
      )
    if self.solver == ("unipc" if causal else "few_step"):
      raise ValueError(
        "`solver` must be few_step or euler with a `pattern`, euler or unipc"
        f" without; got {self.solver!r} and the pattern {self.pattern}."
      )
    if self.steps is None:
      fill("steps", self._usual_steps())
    if self.guidance is None:
      both_ways = {"euler": 3.0 if causal else 5.0}
      fill("guidance", (_GUIDANCE | both_ways)[self.solver])
    self._check_steps()
    if self.noisy_context is not None and (not causal or self._is_ode):
      raise ValueError(
        "`noisy_context` must come with few-step chunks; got"
        f" {self.noisy_context} with {self.solver} and the pattern"
        f" {self.pattern}. Leave it out."
      )
    _ = self.schedules  # raises if times do not decrease

  @property
  def _is_ode(self) -> bool:
    return self.solver != "few_step"

  def _usual_steps(self) -> tuple[int, ...]:
    if self._is_ode:
      return (50,)
    if self.mid_times is not None:
      return tuple(len(times) + 1 for times in self.mid_times)
    return (4,)

  def _check_steps(self) -> None:
    assert self.steps is not None  # filled
    if not self.steps or min(self.steps) < 1:
      raise ValueError(
        f"`steps` must be at least 1 each, such as (4, 2); got {self.steps}."
      )
    if self._is_ode:
      if len(self.steps) > 1 or self.mid_times is not None:
        raise ValueError(
          f"`steps` must be one number for {self.solver}, without `mid_times`;"
          f" got {self.steps} and {self.mid_times}."
        )
    elif self.mid_times is not None:
      fitting = tuple(len(times) + 1 for times in self.mid_times)
      if fitting != self.steps:
        raise ValueError(
          "`mid_times` must have one time fewer than `steps` for each chunk;"
          f" got {self.mid_times} for {self.steps}."
        )
    elif unknown := [n for n in self.steps if n not in (1, 2, 4)]:
      raise ValueError(
        f"`steps` must be 4, 2 or 1, whose times are known; got {unknown[0]}."
        " Give `mid_times` for other numbers."
      )

  @property
  def schedules(self) -> tuple[tuple[float, ...], ...]:
    """Times of each chunk, the last one's serving all further chunks."""
    assert self.steps is not None  # filled
    if self._is_ode:
      times = sampling.ode_schedule(self.steps[0], shift=self.shift)
      return (tuple(times.tolist()),)
    mid_times = self.mid_times
    if mid_times is None:
      known = sampling.MID_TIMES
      two = known["2" if self.noisy_context is None else "2_noisy"]
      known = known | {"2": two}
      mid_times = tuple(known[str(n)] for n in self.steps)
    schedules = map(sampling.few_step_schedule, mid_times)
    return tuple(tuple(times.tolist()) for times in schedules)

  def latent_shape(
    self, vae: models.VaeConfig, transformer: models.WanConfig
  ) -> tuple[int, int, int, int]:
    """Returns the shape [f, h, w, c] of the latents.

    Raises:
      ValueError: if the frames fill no whole latent frames or chunks, or if
        height and width fill no whole tokens.
    """
    unit = vae.space_factor * max(transformer.patch[1:])
    for name in ("height", "width"):
      size = getattr(self, name)
      if size < unit or size % unit:
        near = max(unit, size - size % unit)
        raise ValueError(
          f"`{name}` must be divisible by {unit}; got {size}. Near it are"
          f" {near} and {near + unit}."
        )
    step, frames = vae.time_factor, self.frames
    if frames < 1 or (frames - 1) % step:
      below = max(1, frames - (frames - 1) % step)
      raise ValueError(
        f"`frames` must be {step}k + 1, the first one is a latent frame of its"
        f" own; got {frames}. Near it are {below} and {below + step}."
      )
    latents = 1 + (frames - 1) // step
    if self.pattern is not None:
      first, rest = self.pattern.first, self.pattern.rest
      if latents < first or (latents - first) % rest:
        below = first + max(0, (latents - first) // rest) * rest
        near = [1 + step * (n - 1) for n in (below, below + rest)]
        raise ValueError(
          f"`frames` must fill whole chunks of {self.pattern}, in latent"
          f" frames; got {frames}, which are {latents} of them. Near it are"
          f" {near[0]} and {near[1]}."
        )
    return vae.latent_shape(frames, self.height, self.width)

  def record(self) -> Mapping[str, Any]:
    """Returns what JSON keeps of it beside a clip."""
    pattern = self.pattern and dataclasses.asdict(self.pattern)
    fields = ("frames", "height", "width", "solver", "noisy_context")
    return {
      **{name: getattr(self, name) for name in fields},
      "guidance": self.guidance,
      "pattern": pattern,
      "schedules": [list(times) for times in self.schedules],
    }
