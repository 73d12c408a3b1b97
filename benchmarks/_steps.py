"""Train steps of the paper's settings on random data: built, compiled, timed.

What `train_step.py` and `scaling.py` share. A step is the one that `crcm
train` runs: `training.make_train_step` on the objective of
`experiments/configs/paper.py`: bfloat16 compute, float32 masters, moments and
average, a bfloat16 working copy, frozen networks in bfloat16, the state
donated. Only the parameters and the data are drawn at random.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import math
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

# Both must be set before JAX meets the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true")

import _necessary
import _trace
import jax
import jax.numpy as jnp

from crcm_jax import training
from crcm_jax.training import sharding
from crcm_jax.training._stages import Phase

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30
PEAK = 989e12
"""Dense bfloat16 operations a second of an H100 or H200."""

TINY = dict(
  network=dict(
    layers=2,
    width=32,
    heads=2,
    ffn_width=64,
    freq_width=16,
    text_width=8,
    text_length=4,
  ),
  data=dict(frames=3, height=8, width=8, text_width=8, text_length=4),
)
"""What `--tiny` changes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A step to measure.

  Attributes:
    name: of the step, a key of `STEPS`.
    size: of the network, "1.3b" or "14b".
    pattern: frames of the first and of each later chunk.
    batch: videos of a step, on all devices together.
    mesh: devices along each axis.
    remat: what a layer keeps, a name in `models.REMAT_POLICIES`.
    tiny: whether to shrink everything, to see that it runs.
  """

  name: str
  size: str = "1.3b"
  pattern: tuple[int, int] = (1, 1)
  batch: int = 1
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)
  remat: str = "outputs"
  tiny: bool = False

  def __str__(self) -> str:
    return f"{self.name} {self.size} {mesh_name(self.mesh)} x{self.batch}"


STEPS: dict[str, tuple[str, Phase]] = {
  "tf_scm": ("tf_scm", "student"),
  "tf_dcm": ("tf_dcm", "student"),
  "sf_dmd": ("sf_dmd", "student"),
  "critic": ("sf_dmd", "critic"),
}
"""Stage and phase of each step."""


@dataclasses.dataclass(kw_only=True)
class Row:
  """What was measured of a step; None where it failed, `error` says why.

  Attributes:
    case: the step.
    devices: how many it ran on.
    flops: necessary operations of the whole batch.
    lower_s: seconds of tracing and lowering.
    compile_s: seconds of compiling.
    seconds: of each repetition.
    peak_gib: device memory that the compiled step asks for: arguments,
      results that are no donated arguments, and temporary arrays.
    peak_seen_gib: the most that the device ever held, in this process so far.
    state_gib: of which the state on one device.
    collectives: shares of the step's time, measured in a trace.
    kernels: names, calls and milliseconds of what took the most time.
    metrics: of the last repetition.
    error: why there are no numbers.
  """

  case: Case
  devices: int
  flops: float
  lower_s: float | None = None
  compile_s: float | None = None
  seconds: list[float] = dataclasses.field(default_factory=list)
  peak_gib: float | None = None
  peak_seen_gib: float | None = None
  state_gib: float | None = None
  collectives: _trace.Collectives | None = None
  kernels: list[_trace.Kernel] = dataclasses.field(default_factory=list)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  error: str | None = None

  @property
  def median_s(self) -> float:
    """Median of the repetitions; NaN without any."""
    return statistics.median(self.seconds) if self.seconds else float("nan")

  @property
  def min_s(self) -> float:
    """The fastest repetition; NaN without any."""
    return min(self.seconds, default=float("nan"))

  @property
  def utilisation(self) -> float:
    """Necessary operations beside what the devices can do in that time."""
    return self.flops / (self.median_s * PEAK * self.devices)

  @property
  def tokens_per_s(self) -> float:
    """Video tokens that are trained on, a second."""
    video = video_of(stage_of(self.case))
    return self.case.batch * video.frames * video.tokens / self.median_s

  @property
  def lacks_memory(self) -> bool:
    """Whether it failed for want of memory."""
    signs = ("does not fit", "RESOURCE_EXHAUSTED", "out of memory")
    return any(sign in (self.error or "") for sign in signs)

  def as_dict(self) -> dict[str, Any]:
    """Everything, for a file."""
    derived = {}
    if self.seconds:
      names = ("median_s", "min_s", "utilisation", "tokens_per_s")
      derived = {name: getattr(self, name) for name in names}
    return dataclasses.asdict(self) | derived


# --- What is measured ---


@functools.cache
def _paper() -> Any:
  path = ROOT / "experiments" / "configs" / "paper.py"
  spec = importlib.util.spec_from_file_location("paper", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def stage_of(case: Case) -> training.Stage:
  """Builds the paper's stage, with the case's sizes."""
  name, _ = STEPS[case.name]
  config = _paper().get_config(f"{name},{case.size}").to_dict()
  tiny = TINY if case.tiny else {}
  config["pattern"] = dict(zip(("first", "rest"), case.pattern, strict=True))
  config["network"] |= tiny.get("network", {}) | dict(remat=case.remat)
  config["data"] |= tiny.get("data", {})
  config["mesh"] |= case.mesh
  config["working_copy"] = True
  config[name]["data"] = dict(batch_size=case.batch)
  return training.read_experiment(config).stages[name]


def video_of(stage: training.Stage) -> _necessary.Video:
  """Returns the sizes that operations are counted for."""
  _, frames, height, width, _ = stage.dataset.shapes().x_0.shape
  assert stage.pattern is not None
  config = stage.model.config
  tokens = config.tokens_per_frame(height, width)
  return _necessary.Video(
    config=config, frames=frames, tokens=tokens, pattern=stage.pattern
  )


def rollout_steps(stage: training.Stage) -> int:
  """Returns the denoising steps of a chunk, in the longest rollout."""
  (schedule,) = stage.sampling.mid_times[str(stage.sampling.most_steps)]
  return len(schedule) + 1


def flops_of(case: Case) -> float:
  """Counts the necessary operations of a step of the whole batch."""
  stage = stage_of(case)
  objective: Any = stage.objectives["student"]
  video = video_of(stage)
  guided = objective.guidance != 1
  steps = rollout_steps(stage)
  one = {
    "tf_scm": lambda: _necessary.tf_scm(video, guided=guided),
    "tf_dcm": lambda: _necessary.tf_dcm(
      video, guided=guided, skip=objective.skip
    ),
    "sf_dmd": lambda: _necessary.sf_dmd(video, steps=steps, guided=guided),
    "critic": lambda: _necessary.critic(video, steps=steps),
  }[case.name]()
  return case.batch * one


# --- Arguments of a step: shapes first, arrays when it is its turn ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """A step with the shapes and places of its arguments.

  Attributes:
    case: what it is.
    stage: its stage.
    step: the jitted step.
    arguments: shapes of state, frozen networks, batch and key.
  """

  case: Case
  stage: training.Stage
  step: Any
  arguments: training.StepArguments

  @property
  def devices(self) -> int:
    """Devices of its mesh."""
    return math.prod(self.case.mesh.values())

  def draw(self) -> tuple[Any, ...]:
    """Draws the arguments where they belong."""
    state, frozen, batch, key = self.arguments
    keys = jax.random.split(jax.random.key(0), 3)
    roles = dict(zip(frozen, jax.random.split(keys[1], 8), strict=False))
    drawn_frozen = {
      role: _drawn(scattered, shapes, roles[role])
      for role, shapes in frozen.items()
    }
    return (
      _drawn(functools.partial(_fresh, self.stage), state, keys[0]),
      drawn_frozen,
      _drawn(_noise, batch, keys[2]),
      jax.device_put(jax.random.key(1), key.sharding),
    )

  def iteration(self) -> int:
    """The first iteration of the phase in which rollouts are longest."""
    _, phase = STEPS[self.case.name]
    most, order = rollout_steps(self.stage), self.stage.alternation
    for i in itertools.count():
      counters = order.counters(i)
      done = counters.student if phase == "student" else counters.critic
      if self.stage.phase(i) == phase and int(done) % most == most - 1:
        return i
    raise AssertionError("the count goes around")


def program_of(case: Case) -> Program:
  """Builds a step and the shapes of its arguments; computes nothing."""
  mesh = mesh_of(case)
  stage = stage_of(case).on(mesh)
  arguments = training.step_arguments(stage, mesh)
  _, phase = STEPS[case.name]
  step = stage.train_steps(arguments.shardings())[phase]
  return Program(case=case, stage=stage, step=step, arguments=arguments)


def mesh_of(case: Case) -> jax.sharding.Mesh:
  """Returns a mesh of the first devices, as many as the case needs."""
  shape = tuple(case.mesh.get(axis, 1) for axis in sharding.AXES)
  return jax.make_mesh(
    shape,
    sharding.AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    devices=jax.devices()[: math.prod(shape)],
  )


def _drawn(draw: Callable[..., Any], shapes: Any, key: Any) -> Any:
  where = jax.tree.map(lambda a: a.sharding, shapes)
  plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), shapes)
  return jax.jit(lambda key: draw(plain, key), out_shardings=where)(key)


def _fresh(stage: training.Stage, shapes: training.TrainState, key: Any) -> Any:
  """Draws a network and returns the state before the first iteration."""
  keys = jax.random.split(key)
  return training.init_state(
    scattered(shapes.student, keys[0]),
    stage.optimizers["student"],
    fake=None if shapes.fake is None else scattered(shapes.fake, keys[1]),
    fake_optimizer=stage.optimizers.get("critic"),
  )


def scattered(shapes: Any, key: Any) -> Any:
  """Fills parameters, each element from its index: in parts where sharded.

  Scales are 1; what else there is has mean 0 and keeps the size of features.
  """
  seed = jax.random.bits(key)

  def fill(path: Any, leaf: Any) -> jax.Array:
    if path[-1].key == "scale":
      return jnp.ones(leaf.shape, leaf.dtype)
    index = jnp.full(leaf.shape, seed)
    for axis, stride in enumerate((19349663, 83492791, 73856093)[: leaf.ndim]):
      along = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
      index = (index ^ (along * jnp.uint32(stride))) * jnp.uint32(2654435761)
      index ^= index >> 15
    uniform = index.astype(jnp.float32) / 2.0**31 - 1
    std = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.02
    return (3**0.5 * std * uniform).astype(leaf.dtype)

  return jax.tree.map_with_path(fill, shapes)


def _noise(shapes: Any, key: Any) -> Any:
  draw = lambda a: jax.random.normal(key, a.shape, a.dtype)
  return jax.tree.map(draw, shapes)


# --- Compiling, all steps at once ---


def compile_all(
  cases: Sequence[Case], workers: int = 4
) -> list[tuple[Program, Any, Row]]:
  """Compiles the steps side by side, before anything is on the device.

  Returns:
    Programs, what compiling made of them (None if it failed), and rows to
    fill in.
  """
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    waiting = [_lower(case, pool) for case in cases]
    return [(program, wait(), row) for program, row, wait in waiting]


def _lower(
  case: Case, pool: concurrent.futures.Executor
) -> tuple[Program, Row, Callable[[], Any]]:
  """Traces a step and begins to compile it; the last result waits for that."""
  program = program_of(case)
  row = Row(case=case, devices=program.devices, flops=flops_of(case))
  try:
    start = time.perf_counter()
    lowered = program.step.lower(*program.arguments)
    row.lower_s = time.perf_counter() - start
  except Exception as error:
    row.error = said(error)
    return program, row, lambda: None
  row.state_gib = sharding.device_bytes(program.arguments[0]) / GIB
  return program, row, pool.submit(_compile, lowered, row).result


def _compile(lowered: Any, row: Row) -> Any:
  start = time.perf_counter()
  try:
    compiled = lowered.compile()
  except Exception as error:
    row.error = said(error)
    return None
  row.compile_s = time.perf_counter() - start
  row.peak_gib = asked_memory(compiled) / GIB
  return compiled


def asked_memory(compiled: Any) -> int:
  """Bytes that a compiled program needs on each device."""
  m = compiled.memory_analysis()
  return (
    m.argument_size_in_bytes
    + m.output_size_in_bytes
    - m.alias_size_in_bytes
    + m.temp_size_in_bytes
  )


def said(error: Exception) -> str:
  """The gist of an error: running out of memory is one that is expected."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:200]}"


# --- Timing ---


def measure(
  program: Program,
  compiled: Any,
  row: Row,
  *,
  budget_s: float,
  least: int = 2,
  kernels: int = 0,
) -> None:
  """Runs a compiled step for a while and fills its row in.

  Args:
    program: the step.
    compiled: the same, compiled; None does nothing.
    row: to fill in.
    budget_s: seconds of repetitions after a first one.
    least: repetitions whatever they take.
    kernels: of how many kernels to note the time, from one more repetition
      under the profiler; 0 does not profile.
  """
  if compiled is None:
    return
  limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0) / GIB
  assert row.peak_gib is not None
  if limit and row.peak_gib > limit:
    row.error = (
      f"does not fit: it asks for {row.peak_gib:.1f} GiB of {limit:.1f}"
    )
    return
  try:
    _measure(program, compiled, row, budget_s, least, kernels)
  except Exception as error:
    row.error = said(error)
  gc.collect()


def _measure(program, compiled, row, budget_s, least, kernels) -> None:
  state, *rest = program.draw()
  step = program.arguments[0].step
  at = program.iteration()

  def once() -> float:
    nonlocal state
    counted = jax.device_put(jnp.asarray(at, step.dtype), step.sharding)
    state = dataclasses.replace(state, step=counted)
    jax.block_until_ready(state)
    start = time.perf_counter()
    state, metrics = compiled(state, *rest)
    jax.block_until_ready((state, metrics))
    took = time.perf_counter() - start
    row.metrics = {
      name: float(v) for name, v in metrics.items() if isinstance(v, jax.Array)
    }
    return took

  once()  # the first run loads kernels
  enough = lambda: sum(row.seconds) >= budget_s or len(row.seconds) >= 20
  while len(row.seconds) < least or not enough():
    row.seconds.append(once())
  row.peak_seen_gib = peak_seen() / GIB
  if kernels:
    with tempfile.TemporaryDirectory() as folder:
      with jax.profiler.trace(folder):
        once()
      trace = _trace.read(folder)
    row.collectives = _trace.collectives(trace)
    row.kernels = _trace.longest(trace, kernels)


def peak_seen() -> float:
  """Bytes of the fullest device's fullest moment; NaN if it does not say."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  return max(s.get("peak_bytes_in_use", float("nan")) for s in stats)


# --- Command line ---


def about() -> dict[str, Any]:
  """What the numbers depend on."""
  device = jax.devices()[0]
  stats = device.memory_stats() or {}
  return dict(
    device=device.device_kind,
    devices=jax.device_count(),
    memory_gib=stats.get("bytes_limit", 0) / GIB,
    driver=device.client.platform_version,
    jax=jax.__version__,
    jaxlib=importlib.metadata.version("jaxlib"),
    date=datetime.date.today().isoformat(),
    command=shlex.join(["python", *sys.argv]),
    xla_flags=os.environ.get("XLA_FLAGS", ""),
  )


def start(tiny: bool = False) -> None:
  """Shares compiled programs with later runs; a rehearsal compiles fast."""
  jax.config.update("jax_disable_most_optimizations", tiny)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = ROOT / ".cache" / "jax"
    jax.config.update("jax_compilation_cache_dir", str(cache))


def mesh_name(mesh: dict[str, int]) -> str:
  """Returns a mesh as it is written on the command line."""
  split = {axis: n for axis, n in mesh.items() if n > 1}
  return ",".join(f"{axis}={n}" for axis, n in split.items()) or "one"


def parse_mesh(text: str) -> dict[str, int]:
  """Reads `fsdp=2,context=4`; `one` is a single device.

  Raises:
    ValueError: if it has another form.
  """
  if text in ("", "one"):
    return {}
  mesh = {}
  for part in text.split(","):
    axis, _, number = part.partition("=")
    if axis not in sharding.AXES or not number.isdecimal():
      raise ValueError(
        f"a mesh must be like fsdp=2,context=4, with axes of {sharding.AXES};"
        f" got {text!r}."
      )
    mesh[axis] = int(number)
  return mesh
