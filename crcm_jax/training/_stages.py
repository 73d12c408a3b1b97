"""A stage: one objective, its networks and settings, built of a config.

A stage holds everything but arrays. Its config is the keyword arguments of the
calls that build it:

    seed=0, steps=300,
    network=dict(...)        # of models.WanConfig
    pattern=dict(...)        # of ChunkPattern; none for a bidirectional stage
    data=dict(name=..., ...) # a dataset of _data.DATASETS
    objective=dict(name=..., ...),  # of the objective that KINDS names
    optimizer=dict(...)      # of training.adamw
    working_copy=True        # see Stage
    init=dict(student=SOURCE, teacher=SOURCE),
    sampling=dict(...)       # of Sampling
    loop=dict(...)           # of Loop
    mesh=dict(...)           # of sharding.make_mesh
    sharding="wan",          # or rules, see sharding.read_rules

and with a critic

    critic=dict(...), critic_optimizer=dict(...), alternation=dict(...)

Teachers and critic have the student's network but for what `networks` changes,
and the critic has that of the bidirectional teacher, which it starts as:

    networks=dict(real=dict(layers=40, width=5120, ...), teacher=dict(...))

The objective `joint` adds up others, each from its own iteration on:

    objective=dict(
      name="joint",
      parts=("continuous_consistency", "self_forcing"),
      continuous_consistency=dict(...),
      self_forcing=dict(start=1000, ...),
    )
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import optax

from crcm_jax import data, models, time_sampling
from crcm_jax._typing import Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training import _config, _data, _networks, objectives, sharding
from crcm_jax.training._counters import Alternation
from crcm_jax.training._optimizer import adamw, warmed_up
from crcm_jax.training._samplers import Generator, Sampling
from crcm_jax.training._state import init_state, TrainState
from crcm_jax.training._step import (
  as_read,
  make_train_step,
  Shardings,
  TrainStep,
)

Phase: TypeAlias = Literal["student", "critic"]
"""Which network an iteration trains."""


class Kind(NamedTuple):
  """What a stage with a certain objective needs.

  Attributes:
    objective: the class of the student's objective.
    causal: whether the student is causal.
    frozen: names of the frozen networks; "real" is bidirectional.
    few_step: whether the student is sampled in few steps.
    critic: whether a fake score is trained beside it.
  """

  objective: Any
  causal: bool = True
  frozen: tuple[str, ...] = ()
  few_step: bool = False
  critic: bool = False


KINDS = {
  "bidirectional_diffusion": Kind(
    objectives.BidirectionalDiffusion, causal=False
  ),
  "teacher_forcing": Kind(objectives.TeacherForcing),
  "diffusion_forcing": Kind(objectives.DiffusionForcing),
  "discrete_consistency": Kind(
    objectives.DiscreteConsistency, frozen=("teacher",), few_step=True
  ),
  "continuous_consistency": Kind(
    objectives.ContinuousConsistency, frozen=("teacher",), few_step=True
  ),
  "mean_flow": Kind(objectives.MeanFlow, frozen=("teacher",), few_step=True),
  "ode_regression": Kind(
    objectives.OdeRegression, frozen=("teacher",), few_step=True
  ),
  "bidirectional_ode_regression": Kind(
    objectives.BidirectionalOdeRegression, frozen=("real",), few_step=True
  ),
  "self_forcing": Kind(
    objectives.SelfForcing, frozen=("real",), few_step=True, critic=True
  ),
  "joint": Kind(objectives.Joint),  # and what its parts need
}
"""The stages' objectives by the names that configs give them."""

DISTRIBUTIONS = {
  "log_normal": time_sampling.LogNormal,
  "shifted_uniform": time_sampling.ShiftedUniform,
}
"""The distributions of training times by the names that configs give them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """How a stage is run; what it computes does not depend on it.

  Attributes:
    log_every: steps between two lines of metrics.
    checkpoint_every: steps between two checkpoints.
    sample_every: steps between two sets of sample videos; 0 for none.
    keep: checkpoints to keep, the newest.
    milestone_every: steps between two checkpoints that are kept for ever; 0
      for none.
    allow_skipped: updates that may be skipped because they were not finite.
    tensorboard: whether to write for TensorBoard, beside the files.
    micro_batches: parts of a batch that a step takes one after another, to
      save memory.
    lean_rollouts: whether rollouts on several devices spare memory, not time;
      see `sharding.shard_model`.
    unroll_rollouts: whether rollouts on GPUs, unless lean, take shorter passes
      for a longer compilation; see `objectives.SelfForcing`.
    data_workers: processes that read data beside the main one; 0 for a thread.
    max_bad_records: records of the dataset to skip because they are cut off,
      of another shape or not finite; one more is an error that names them all.
      Each process counts what it reads, and a checkpoint keeps the first one's.
  """

  log_every: int = 1
  checkpoint_every: int = 100
  sample_every: int = 0
  keep: int = 2
  milestone_every: int = 0
  allow_skipped: int = 0
  tensorboard: bool = True
  micro_batches: int = 1
  lean_rollouts: bool = False
  unroll_rollouts: bool = True
  data_workers: int = 0
  max_bad_records: int = 10

  def __post_init__(self):
    positive = ("log_every", "checkpoint_every", "keep", "micro_batches")
    for field in dataclasses.fields(self):
      least, value = int(field.name in positive), getattr(self, field.name)
      _config.check_whole(f"loop.{field.name}", value, least)

  def reading(self) -> data.Reading:
    """Returns how a prepared dataset is read."""
    return data.Reading(workers=self.data_workers, max_bad=self.max_bad_records)

  def is_due(self, what: str, step: int, last: int) -> bool:
    """Whether "log", "checkpoint", "milestone" or "sample" is due."""
    every = getattr(self, f"{what}_every")
    return every > 0 and (step % every == 0 or step == last)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """One stage, with everything built but arrays.

  Attributes:
    name: of the stage, and of its workdir in the experiment's.
    config: its resolved config as JSON values, which its checkpoints keep.
    stages: names of the experiment's stages, which its sources may use.
    kind: what its objective needs.
    steps: iterations in all.
    seed: of parameters, data order and draws.
    ema_rate: relative width of the student's moving average.
    working_copy: whether networks read a copy of their linear layers in the
      dtype that they compute in, made once a step, and frozen ones are kept in
      it.
    model: the student's network.
    networks: the network of each of "teacher", "real" and "fake" that the
      stage has.
    pattern: the student's chunks; None if it is bidirectional.
    dataset: what it reads.
    objectives: the loss of each phase, "student" and perhaps "critic".
    optimizers: likewise.
    learning_rates: the schedule of each optimizer, to be shown.
    alternation: the order of the phases.
    init: the source of each network's first parameters.
    sampling: how the student is sampled.
    loop: how often to log, save and sample.
    mesh: the devices along each axis, of `sharding.make_mesh`.
    rules: how parameters are sharded.
  """

  name: str
  config: dict[str, Any]
  stages: tuple[str, ...]
  kind: Kind
  steps: int
  seed: int
  ema_rate: float
  working_copy: bool
  model: models.Wan
  networks: dict[str, models.Wan]
  pattern: ChunkPattern | None
  dataset: _data.Dataset
  objectives: dict[Phase, objectives.Objective]
  optimizers: dict[Phase, optax.GradientTransformation]
  learning_rates: dict[Phase, optax.Schedule]
  alternation: Alternation
  init: dict[str, str]
  sampling: Sampling
  loop: Loop
  mesh: dict[str, Any]
  rules: sharding.Rules

  def on(self, mesh: jax.sharding.Mesh) -> "Stage":
    """Returns this stage with networks that compute on a mesh.

    Raises:
      ValueError: if batch, heads or tokens do not divide by their devices.
    """
    video, parts = self.dataset.shapes().x_0.shape, self.loop.micro_batches
    for network in (self.model, *self.networks.values()):
      sharding.check_stage(mesh.shape, network.config, video, parts)
    return read_stage(self.name, self.config, self.stages, mesh)

  def phase(self, iteration: int) -> Phase:
    """Returns which network an iteration trains."""
    return "student" if self.alternation.is_student(iteration) else "critic"

  def is_saved(self, step: int) -> bool:
    """Whether there is a checkpoint after a step."""
    return any(
      self.loop.is_due(what, step, self.steps)
      for what in ("checkpoint", "milestone")
    )

  def train_steps(
    self, shardings: Shardings | None = None
  ) -> dict[Phase, TrainStep]:
    """Returns the jitted step of each phase."""
    return {
      phase: make_train_step(
        objective,
        self.optimizers[phase],
        phase=phase,
        alternation=self.alternation,
        ema_rate=self.ema_rate,
        micro_batches=self.loop.micro_batches,
        copy_dtype=self.copy_dtypes,
        learning_rate=self.learning_rates[phase],
        shardings=shardings,
      )
      for phase, objective in self.objectives.items()
    }

  @property
  def copy_dtypes(self) -> dict[str, Any]:
    """Dtype of the copy that each role's network reads: its own."""
    if not self.working_copy:
      return {}
    networks = {"student": self.model, **self.networks}
    return {role: network.config.dtype for role, network in networks.items()}

  def run_key(self) -> PRNGKeyArray:
    """Returns the key of all the training's draws."""
    return jax.random.fold_in(jax.random.key(self.seed), 1)

  def state_shapes(self) -> TrainState:
    """Returns the shapes and dtypes of the state."""

    def fresh() -> TrainState:
      key = jax.random.key(0)
      student = _networks.init_params(self.model, key)
      if not self.kind.critic:
        return self._state(student, None)
      fake = _networks.init_params(self.networks["fake"], key)
      return self._state(student, fake)

    return jax.eval_shape(fresh)

  def frozen_shapes(self) -> dict[str, Params]:
    """Returns the shapes and dtypes of what `load_frozen` returns."""
    shapes = {
      role: _networks.param_shapes(self.networks[role])
      for role in self.kind.frozen
    }
    return {
      role: jax.eval_shape(
        functools.partial(as_read, dtype=self.copy_dtypes.get(role)), params
      )
      for role, params in shapes.items()
    }

  def init_state(
    self, experiment: pathlib.Path, shardings: Any = None
  ) -> TrainState:
    """Returns the state before the first iteration.

    Args:
      experiment: folder of the experiment, with the workdirs of its stages.
      shardings: a `TrainState` of where its arrays shall live, so that no
        device need hold more than its part; None for JAX's default device.

    Raises:
      ValueError: if a source is missing or does not fit.
    """
    of_student = None if shardings is None else shardings.student
    if "student" in self.init:
      student = self._placed("student", experiment, of_student)
    else:
      student = self._drawn(of_student)
    fake = None
    if self.kind.critic:
      of_fake = None if shardings is None else shardings.fake
      fake = self._placed("fake", experiment, of_fake)
    build = lambda student, fake: self._state(student, fake)
    return jax.jit(build, out_shardings=shardings)(student, fake)

  def load_frozen(
    self, experiment: pathlib.Path, shardings: Any = None
  ) -> dict[str, Params]:
    """Returns the parameters that the objectives need and do not train.

    Args:
      experiment: folder of the experiment.
      shardings: where they shall live; None for JAX's default device.
    """
    frozen = {}
    for role in self.kind.frozen:
      where = None if shardings is None else shardings[role]
      params = self._placed(role, experiment, where)
      read = functools.partial(as_read, dtype=self.copy_dtypes.get(role))
      frozen[role] = jax.jit(read, out_shardings=where)(params)
    return frozen

  def _drawn(self, where: Any) -> Params:
    """Returns a fresh student: the same numbers wherever they shall live."""

    def draw() -> Params:
      key = jax.random.fold_in(jax.random.key(self.seed), 0)
      return _networks.init_params(self.model, key)

    return jax.jit(draw, out_shardings=where)()

  def _placed(self, role: str, experiment: pathlib.Path, where: Any) -> Params:
    params = self.load_role(role, experiment)
    if where is None:
      return jax.device_put(params)
    return sharding.place(params, where)

  def load_role(self, role: str, experiment: pathlib.Path) -> Params:
    """Loads the network that plays a role from its source, as NumPy arrays.

    Args:
      role: a key of `init`.
      experiment: folder of the experiment.

    Raises:
      ValueError: if the source is missing, or its network does not fit.
    """
    return self._adopt(
      self.init[role],
      experiment,
      self.networks.get(role, self.model),
      None if role in ("real", "fake") else self.pattern,
      f"config.{self.name}.init.{role}",
    )

  def load(self, source: str, experiment: pathlib.Path) -> Params:
    """Loads this stage's network, as trained, as NumPy arrays.

    Args:
      source: the stage's name, or another source of its parameters.
      experiment: folder of the experiment.

    Raises:
      ValueError: if the source is missing, or its network does not fit.
    """
    return self._adopt(source, experiment, self.model, self.pattern, source)

  def _adopt(
    self,
    source: str,
    experiment: pathlib.Path,
    model: models.Wan,
    pattern: ChunkPattern | None,
    name: str,
  ) -> Params:
    origin = _networks.load_source(
      source, workdir=experiment, stages=self.stages
    )
    return _networks.adopt(origin, model, pattern=pattern, name=name)

  def sampler(self) -> Generator:
    """Returns the sampler of the student."""
    if not self.kind.few_step:
      return self.sampling.ode(self.model, self.pattern)
    assert self.pattern is not None
    return self.sampling.few_step(self.model, self.pattern)

  def _state(self, student: Params, fake: Params | None) -> TrainState:
    return init_state(
      student,
      self.optimizers["student"],
      fake=fake,
      fake_optimizer=self.optimizers.get("critic"),
    )


def read_stage(
  name: str,
  config: Mapping[str, Any],
  stages: tuple[str, ...] = (),
  mesh: jax.sharding.Mesh | None = None,
) -> Stage:
  """Builds one stage of its resolved config.

  Args:
    name: of the stage.
    config: the resolved config, such as a checkpoint holds.
    stages: the experiment's stages.
    mesh: devices that its networks compute on; None for JAX's default one.

  Raises:
    ValueError: as `read_experiment`.
  """
  config = _config.as_dict({"stage": name, **config})
  section = _config.Section(config, f"config.{name}")
  section["stage"]
  kind = _kind(section["objective"])
  model = models.Wan(section["network"].call(models.WanConfig))
  networks = _other_networks(section, config["network"], kind)
  loop = section.section("loop").call(Loop)
  if mesh is not None:
    on = functools.partial(
      sharding.shard_model, mesh=mesh, lean=loop.lean_rollouts
    )
    model = on(model)
    networks = {role: on(network) for role, network in networks.items()}
  if kind.causal:
    pattern = section["pattern"].call(ChunkPattern)
  else:
    pattern = config["pattern"] = None
    section.take("pattern")
  sampling = section.section("sampling").call(Sampling)
  given = {
    "student": model,
    **networks,
    "pattern": pattern,
    "mid_times": sampling.mid_times[str(sampling.most_steps)],
    "solver": sampling.solver,
    "ode_steps": sampling.ode_steps,
    "ode_shift": sampling.ode_shift,
    "context": sampling.context,
    "context_start": sampling.context_start,
    "context_times": sampling.context_times,
    # Layers gathered in each pass must not all be there at once.
    "unroll": loop.unroll_rollouts and not loop.lean_rollouts,
  }

  phases: dict[Phase, objectives.Objective] = {
    "student": _objective(section["objective"], kind.objective, given)
  }
  settings: dict[Phase, _config.Section] = {"student": section["optimizer"]}
  if kind.critic:
    phases["critic"] = _objective(section["critic"], objectives.Critic, given)
    settings["critic"] = section["critic_optimizer"]
  _check_solver(sampling, model)
  _config.check_whole(f"config.{name}.steps", section["steps"], 1)
  stage = Stage(
    name=name,
    config=config,
    stages=stages,
    kind=kind,
    steps=section["steps"],
    seed=section["seed"],
    ema_rate=section.get("ema_rate", 0.1),
    working_copy=section.get("working_copy", False),
    model=model,
    networks=networks,
    pattern=pattern,
    dataset=_dataset(section["data"], loop.reading()),
    objectives=phases,
    optimizers={phase: s.call(adamw) for phase, s in settings.items()},
    learning_rates={p: warmed_up(**s.as_dict()) for p, s in settings.items()},
    alternation=section.section("alternation").call(Alternation),
    init=_sources(section.section("init"), kind),
    sampling=sampling,
    loop=loop,
    mesh=section.section("mesh").settings_of(sharding.make_mesh),
    rules=sharding.read_rules(section.take("sharding", "wan")),
  )
  section.check_all_read()
  return stage


def _other_networks(
  section: _config.Section, student: Mapping[str, Any], kind: Kind
) -> dict[str, models.Wan]:
  """Returns the networks of teachers and critic: the student's, changed.

  The critic starts as a copy of the bidirectional teacher and is made like it.
  """
  changes = section.section("networks")
  roles = {role: changes.take(role, {}) for role in kind.frozen}
  if kind.critic:
    roles["fake"] = roles["real"] | changes.take("fake", {})
  networks = {}
  for role, changed in roles.items():
    merged = _config.Section({**student, **changed}, f"networks.{role}")
    networks[role] = models.Wan(merged.call(models.WanConfig))
  return networks


def _check_solver(sampling: Sampling, model: models.Wan) -> None:
  if sampling.solver == "mean_flow" and not model.config.end_time:
    raise ValueError(
      '`config.sampling.solver="mean_flow"` jumps between any two times, which'
      " needs `config.network.end_time=True`."
    )


def stage_of(origin: _networks.Origin) -> Stage:
  """Builds the stage that made some parameters.

  Args:
    origin: from a checkpoint or a file that `crcm export` wrote.

  Raises:
    ValueError: if they do not say which stage made them.
  """
  config = {k: v for k, v in origin.about.items() if k != "at_step"}
  if "stage" not in config:
    raise ValueError(
      "SOURCE must be a stage's workdir or a file of `crcm export`, which say"
      " how to sample them; this one does not."
    )
  return read_stage(config.pop("stage"), config)


def _kind(section: _config.Section) -> Kind:
  """Returns what an objective needs; a joint one, what its parts need."""
  kind = section.choose(KINDS)
  if kind.objective is not objectives.Joint:
    return kind
  parts = [KINDS[name] for name in _parts(section)]
  frozen = [role for part in parts for role in part.frozen]
  return kind._replace(
    frozen=tuple(dict.fromkeys(frozen)),
    few_step=any(part.few_step for part in parts),
    critic=any(part.critic for part in parts),
  )


def _parts(section: _config.Section) -> tuple[str, ...]:
  """Returns the names of a joint objective's parts, causal ones.

  Raises:
    ValueError: if one is no objective of a causal student.
  """
  known = [n for n, kind in KINDS.items() if kind.causal and n != "joint"]
  for name in section["parts"]:
    if name not in known:
      raise ValueError(
        "`parts` of a joint objective must be objectives of a causal student,"
        f" of {known}; got {name!r}."
      )
  return tuple(section["parts"])


def _dataset(section: _config.Section, reading: data.Reading) -> _data.Dataset:
  dataset = section.choose(_data.DATASETS)
  fields = {field.name for field in dataclasses.fields(dataset)}
  more = {"reading": reading} if "reading" in fields else {}
  return section.call(dataset, **more)


def _objective(
  section: _config.Section, objective: Any, given: Mapping[str, Any]
) -> objectives.Objective:
  """Builds an objective of its settings and what it takes of `given`.

  How a student's chunks see each other is one setting of the stage, so that a
  network is sampled as it was trained.
  """
  if objective is objectives.Joint:
    parts = {name: section[name] for name in _parts(section)}
    return objectives.Joint(
      starts=tuple(part.get("start", 0) for part in parts.values()),
      objectives=tuple(
        _objective(part, KINDS[name].objective, given)
        for name, part in parts.items()
      ),
    )
  fields = {field.name for field in dataclasses.fields(objective)}
  more = {name: value for name, value in given.items() if name in fields}
  if "time" in section:
    time = section["time"]
    more["time"] = time.call(time.choose(DISTRIBUTIONS))
  return section.call(objective, **more)


def _sources(section: _config.Section, kind: Kind) -> dict[str, str]:
  """Returns the source of each network that the stage has.

  The fake score starts as a copy of the bidirectional teacher.
  """
  sources = {role: section[role] for role in kind.frozen}
  if "student" in section:
    sources["student"] = section["student"]
  if kind.critic:
    sources["fake"] = section.get("fake", sources["real"])
  for source in sources.values():
    _networks.parse_source(source)
  return sources
