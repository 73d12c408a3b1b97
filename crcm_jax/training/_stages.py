"""A stage: one objective, its networks and settings, built of a config.

A stage holds everything but arrays. Its config is the keyword arguments of the
calls that build it:

    seed=0, steps=300,
    network=dict(...)        # of models.WanConfig
    pattern=dict(...)        # of ChunkPattern; none for a bidirectional stage
    data=dict(name=..., ...) # a dataset of _data.DATASETS
    objective=dict(name=..., ...),  # of the objective that KINDS names
    optimizer=dict(...)      # of training.adamw
    init=dict(student=SOURCE, teacher=SOURCE),
    sampling=dict(...)       # of Sampling
    loop=dict(...)           # of Loop
    mesh=dict(...)           # of sharding.make_mesh
    sharding=((PATTERN, AXES), ...),

and with a critic

    critic=dict(...), critic_optimizer=dict(...), alternation=dict(...)

The objective `joint` adds up others, each from its own iteration on:

    objective=dict(
      name="joint",
      parts=("continuous_consistency", "self_forcing"),
      continuous_consistency=dict(...),
      self_forcing=dict(start=1000, ...),
    )
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import optax

from crcm_jax import models, time_sampling
from crcm_jax._typing import Params, PRNGKeyArray
from crcm_jax.chunks import ChunkPattern
from crcm_jax.training import _config, _data, _networks, objectives, sharding
from crcm_jax.training._counters import Alternation
from crcm_jax.training._optimizer import adamw
from crcm_jax.training._samplers import Generator, Sampling
from crcm_jax.training._state import init_state, TrainState
from crcm_jax.training._step import make_train_step, Shardings, TrainStep

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
  """

  log_every: int = 1
  checkpoint_every: int = 100
  sample_every: int = 0
  keep: int = 2
  milestone_every: int = 0
  allow_skipped: int = 0
  tensorboard: bool = True

  def __post_init__(self):
    least = {"log_every": 1, "checkpoint_every": 1, "keep": 1}
    for name, low in {**least, "milestone_every": 0}.items():
      if getattr(self, name) < low:
        raise ValueError(
          f"`loop.{name}` must be at least {low}; got {getattr(self, name)}."
        )

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
    model: the network; teachers and critic have the same architecture.
    pattern: the student's chunks; None if it is bidirectional.
    dataset: what it reads.
    objectives: the loss of each phase, "student" and perhaps "critic".
    optimizers: likewise.
    alternation: the order of the phases.
    init: the source of each network's first parameters.
    sampling: how the student is sampled.
    loop: how often to log, save and sample.
    mesh: the devices along each axis.
    rules: how parameters are sharded.
  """

  name: str
  config: dict[str, Any]
  stages: tuple[str, ...]
  kind: Kind
  steps: int
  seed: int
  ema_rate: float
  model: models.Wan
  pattern: ChunkPattern | None
  dataset: _data.Dataset
  objectives: dict[Phase, objectives.Objective]
  optimizers: dict[Phase, optax.GradientTransformation]
  alternation: Alternation
  init: dict[str, str]
  sampling: Sampling
  loop: Loop
  mesh: dict[str, int]
  rules: sharding.Rules

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
        shardings=shardings,
      )
      for phase, objective in self.objectives.items()
    }

  def run_key(self) -> PRNGKeyArray:
    """Returns the key of all the training's draws."""
    return jax.random.fold_in(jax.random.key(self.seed), 1)

  def state_shapes(self) -> TrainState:
    """Returns the shapes and dtypes of the state."""

    def fresh() -> TrainState:
      params = _networks.init_params(self.model, jax.random.key(0))
      return self._state(params, params if self.kind.critic else None)

    return jax.eval_shape(fresh)

  def init_state(self, experiment: pathlib.Path) -> TrainState:
    """Returns the state before the first iteration.

    Args:
      experiment: folder of the experiment, with the workdirs of its stages.

    Raises:
      ValueError: if a source is missing or does not fit.
    """
    if "student" in self.init:
      student = self.load_role("student", experiment)
    else:
      key = jax.random.fold_in(jax.random.key(self.seed), 0)
      student = _networks.init_params(self.model, key)
    fake = self.load_role("fake", experiment) if self.kind.critic else None
    return self._state(student, fake)

  def load_frozen(self, experiment: pathlib.Path) -> dict[str, Params]:
    """Returns the parameters that the objectives need and do not train."""
    return {role: self.load_role(role, experiment) for role in self.kind.frozen}

  def load_role(self, role: str, experiment: pathlib.Path) -> Params:
    """Loads the network that plays a role from its source.

    Args:
      role: a key of `init`.
      experiment: folder of the experiment.

    Raises:
      ValueError: if the source is missing, or its network does not fit.
    """
    return self._adopt(
      self.init[role],
      experiment,
      None if role in ("real", "fake") else self.pattern,
      f"config.{self.name}.init.{role}",
    )

  def load(self, source: str, experiment: pathlib.Path) -> Params:
    """Loads this stage's network, as trained.

    Args:
      source: the stage's name, or another source of its parameters.
      experiment: folder of the experiment.

    Raises:
      ValueError: if the source is missing, or its network does not fit.
    """
    return self._adopt(source, experiment, self.pattern, source)

  def _adopt(
    self,
    source: str,
    experiment: pathlib.Path,
    pattern: ChunkPattern | None,
    name: str,
  ) -> Params:
    origin = _networks.load_source(
      source, workdir=experiment, stages=self.stages
    )
    return _networks.adopt(origin, self.model, pattern=pattern, name=name)

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
  name: str, config: Mapping[str, Any], stages: tuple[str, ...] = ()
) -> Stage:
  """Builds one stage of its resolved config.

  Args:
    name: of the stage.
    config: the resolved config, such as a checkpoint holds.
    stages: the experiment's stages.

  Raises:
    ValueError: as `read_experiment`.
  """
  config = _config.as_dict({"stage": name, **config})
  section = _config.Section(config, f"config.{name}")
  section["stage"]
  kind = _kind(section["objective"])
  model = models.Wan(section["network"].call(models.WanConfig))
  if kind.causal:
    pattern = section["pattern"].call(ChunkPattern)
  else:
    pattern = config["pattern"] = None
    section.take("pattern")
  sampling = section.section("sampling").call(Sampling)
  given = {
    **dict.fromkeys(("student", "teacher", "real", "fake"), model),
    "pattern": pattern,
    "mid_times": sampling.mid_times[str(sampling.most_steps)],
    "solver": sampling.solver,
    "ode_steps": sampling.ode_steps,
    "ode_shift": sampling.ode_shift,
    "context": sampling.context,
    "context_start": sampling.context_start,
    "context_times": sampling.context_times,
  }

  phases: dict[Phase, objectives.Objective] = {
    "student": _objective(section["objective"], kind.objective, given)
  }
  optimizers: dict[Phase, Any] = {"student": section["optimizer"].call(adamw)}
  if kind.critic:
    phases["critic"] = _objective(section["critic"], objectives.Critic, given)
    optimizers["critic"] = section["critic_optimizer"].call(adamw)
  _check_solver(sampling, model)
  stage = Stage(
    name=name,
    config=config,
    stages=stages,
    kind=kind,
    steps=section["steps"],
    seed=section["seed"],
    ema_rate=section.get("ema_rate", 0.1),
    model=model,
    pattern=pattern,
    dataset=_dataset(section["data"]),
    objectives=phases,
    optimizers=optimizers,
    alternation=section.section("alternation").call(Alternation),
    init=_sources(section.section("init"), kind),
    sampling=sampling,
    loop=section.section("loop").call(Loop),
    mesh=section.take("mesh", {}),
    rules=section.take("sharding", sharding.REPLICATED),
  )
  section.check_all_read()
  return stage


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


def _dataset(section: _config.Section) -> _data.Dataset:
  return section.call(section.choose(_data.DATASETS))


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
