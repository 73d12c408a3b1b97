"""Configs become stages, and stages hand parameters to each other."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from crcm_jax import ChunkPattern, models, training
from crcm_jax.training import (
  _config,
  _evaluation,
  _experiment,
  _networks,
  _samplers,
  _stages,
  objectives,
)
from crcm_jax.training._checkpoints import Checkpoints

CONFIGS = pathlib.Path(__file__).parents[2] / "experiments" / "configs"
PATTERN = ChunkPattern(1, 1)


def read(**changes):
  return _experiment.read_experiment(tiny.config(**changes))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(sede=1), r"`config.sede` \(did you mean `seed`\?\)"),
    (
      dict(network=dict(layer=1)),
      r"`config.diffusion.network.layer` is not a setting of `WanConfig`"
      r" \(did you mean `layers`\?\)",
    ),
    (
      dict(diffusion=tiny.DIFFUSION | dict(stepps=1)),
      r"`config.diffusion.stepps` \(did you mean `steps`\?\)",
    ),
    (
      dict(diffusion=tiny.DIFFUSION | dict(init=dict(teacher="x"))),
      r"`config.diffusion.init.teacher`",
    ),
    (
      dict(diffusion=tiny.DIFFUSION | dict(critic_optimizer=dict())),
      r"`config.diffusion.critic_optimizer`",
    ),
    (
      dict(mesh=dict(fdsp=2)),
      r"`config.diffusion.mesh.fdsp` is not a setting of `make_mesh` \(did you"
      r" mean `fsdp`\?\); it takes \['data', 'fsdp', 'context', 'tensor', 'de",
    ),
    (
      dict(sharding=((".*kernel", (None, "fdsp")), (".*", ()))),
      r"`config.sharding` must split .* got 'fdsp' in the rule of '.\*kernel'"
      r" \(did you mean `fsdp`\?\)",
    ),
    (
      dict(sharding=dict(student=((".*", (("data", "fsd"),)),))),
      r"`config.sharding` must split .* got 'fsd'",
    ),
    (dict(stages=("difusion",)), r"`config.difusion` is missing.*`diffusion`"),
    (
      dict(diffusion=tiny.DIFFUSION | dict(objective=dict(name="tf"))),
      r"`config.diffusion.objective.name` must be one of \['bidirectional_dif",
    ),
  ],
)
def test_a_wrong_key_is_found_before_anything_is_trained(changes, message):
  with pytest.raises(ValueError, match=message):
    read(**changes)


def test_a_stage_overrides_what_it_shares():
  stages = read(diffusion=tiny.DIFFUSION | dict(data=dict(batch_size=6))).stages
  assert stages["diffusion"].dataset.shapes().x_0.shape == (6, 2, 2, 2, 2)


def test_how_students_are_sampled_is_one_setting():
  noisy = dict(
    mid_times={"2": ((0.5,), ())}, context="last_step", context_start=1
  )
  stage = read(
    stages=("diffusion", "matching"),
    matching=tiny.SELF_FORCING,
    sampling=noisy,
  ).stages["matching"]
  student, critic = stage.objectives["student"], stage.objectives["critic"]
  assert student.mid_times == critic.mid_times == ((0.5,), ())
  assert student.context == critic.context == "last_step"
  assert stage.sampling.context_times == (0.0, 1.0)
  assert _samplers.Sampling().context_times == (0.0,)


def test_sources_are_parsed_and_checked():
  source = _networks.parse_source("runs/digits/causal:live@30")
  assert source == ("runs/digits/causal", "live", 30)
  assert _networks.parse_source("causal@7") == ("causal", "ema", 7)
  with pytest.raises(ValueError, match=r"WHERE\[:ema\|:live\]\[@STEP\]; got"):
    _networks.parse_source("causal:best")
  with pytest.raises(ValueError, match=r"'nowhere' must name a stage"):
    _networks.load_source("nowhere", workdir=pathlib.Path())


@pytest.fixture
def trained(tmp_path):
  """A stage's workdir with one checkpoint, whose EMA differs from it."""
  stage = tiny.stage()
  state = stage.init_state(tmp_path)
  params = jax.tree.map(lambda a: a + 1, state.student)
  checkpoints = Checkpoints(tmp_path / "diffusion")
  tree = {"student": params, "ema": state.ema}
  checkpoints.save(4, tree, {}, stage.config)
  checkpoints.close()
  return tmp_path


@pytest.mark.parametrize("which", ["ema", "live"])
def test_a_stage_starts_from_another_ones_parameters(trained, which):
  stage = tiny.stage(init=dict(student=f"diffusion:{which}@4"))
  params = stage.init_state(trained).student
  kept = Checkpoints(trained / "diffusion").read(4).state
  expected = kept["ema" if which == "ema" else "student"]
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_the_fake_score_starts_as_a_copy_of_the_bidirectional_teacher(trained):
  stage = read(
    stages=("diffusion", "matching"), matching=tiny.SELF_FORCING
  ).stages["matching"]
  state, frozen = stage.init_state(trained), stage.load_frozen(trained)
  jax.tree.map(np.testing.assert_array_equal, state.fake, frozen["real"])


def test_teachers_and_critic_may_be_larger_than_the_student(trained):
  stage = read(
    stages=("diffusion", "matching"),
    matching=tiny.SELF_FORCING
    | dict(
      network=dict(width=4),
      networks=dict(real=dict(width=8)),
      init=dict(real="diffusion"),
    ),
  ).stages["matching"]
  state, frozen = stage.init_state(trained), stage.load_frozen(trained)
  width = lambda params: params["patch_embedding"]["kernel"].shape[-1]
  assert width(state.student) == width(state.ema) == 4
  assert width(state.fake) == width(frozen["real"]) == 8
  like = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert like(stage.state_shapes()) == like(state)
  assert like(stage.frozen_shapes()) == like(frozen)
  batch = next(stage.dataset.batches(trained, 0))
  for step in stage.train_steps().values():
    new, _ = jax.eval_shape(step, state, frozen, batch, stage.run_key())
    assert like(new) == like(state)


def test_a_larger_teacher_is_evaluated_in_its_own_network(trained):
  config = tiny.config(
    stages=("matching",),
    matching=tiny.SELF_FORCING
    | dict(
      network=dict(width=4),
      networks=dict(real=dict(width=8)),
      init=dict(real=str(trained / "diffusion")),
    ),
  )
  del config["diffusion"]
  experiment = _experiment.read_experiment(config)
  teacher = next(_evaluation.networks(experiment, trained))
  assert teacher.name == "bidirectional"
  batch = experiment.stages["matching"].dataset.shapes()
  clips = jax.eval_shape(
    lambda params, batch: teacher.generate(params, jax.random.key(0), batch),
    teacher.params,
    batch,
  )
  assert clips.shape == batch.x_0.shape


def test_networks_are_of_roles_that_the_stage_has():
  with pytest.raises(ValueError, match=r"`config.matching.networks.teacher`"):
    read(
      stages=("diffusion", "matching"),
      matching=tiny.SELF_FORCING | dict(networks=dict(teacher=dict(width=4))),
    )
  with pytest.raises(ValueError, match=r"`networks.real.widht` is not a sett"):
    read(
      stages=("diffusion", "matching"),
      matching=tiny.SELF_FORCING | dict(networks=dict(real=dict(widht=4))),
    )


def test_a_stage_that_is_not_trained_yet_is_named(tmp_path):
  stage = tiny.stage(init=dict(student="diffusion"))
  with pytest.raises(ValueError, match=r"must be the workdir of a stage that"):
    stage.init_state(tmp_path)


def test_handed_over_parameters_must_fit(tmp_path):
  model = tiny.stage().model
  params = _networks.init_params(model, jax.random.key(0))
  adopt = lambda origin: _networks.adopt(
    origin, model, pattern=PATTERN, name="config.x.init.student"
  )
  other = _networks.Origin(params, ChunkPattern(3, 3), {})
  message = (
    r"must come from a network of the pattern ChunkPattern\(first=1, rest=1\);"
    r" this one was trained with ChunkPattern\(first=3, rest=3\)"
  )
  with pytest.raises(ValueError, match=message):
    adopt(other)
  wide = jax.tree.map(lambda a: jnp.zeros((*a.shape[:-1], 99)), params)
  with pytest.raises(ValueError, match=r"must have the sizes of .*99"):
    adopt(_networks.Origin(wide, None, {}))
  with pytest.raises(ValueError, match=r"not in both: \['extra'\]"):
    adopt(_networks.Origin(params | {"extra": jnp.zeros(1)}, None, {}))


def test_a_file_of_parameters_knows_its_chunks(tmp_path):
  params = {"w": jnp.ones(3)}
  about = {"pattern": {"first": 1, "rest": 1}}
  models.save_params(tmp_path / "a.safetensors", params, about)
  origin = _networks.load_source(
    str(tmp_path / "a.safetensors"), workdir=tmp_path
  )
  assert origin.pattern == PATTERN
  with pytest.raises(ValueError, match=r"SOURCE must be a stage's workdir"):
    _stages.stage_of(origin)


def test_noise_has_no_captions():
  with pytest.raises(ValueError, match=r"must be a dataset with captions"):
    tiny.stage().dataset.encode(["seven moving left"])


def test_only_known_schedules_are_sampled():
  stage = read(
    stages=("diffusion", "matching"), matching=tiny.SELF_FORCING
  ).stages["matching"]
  with pytest.raises(ValueError, match=r"must be one of \(4, 2, 1\), .*got 3"):
    stage.sampler()({}, jax.random.key(0), stage.dataset.shapes(), 3)


def _eval_step(stage):
  """Traces every phase of a stage, of any size, without an array."""
  state, batch = stage.state_shapes(), stage.dataset.shapes()
  params = _networks.param_shapes(stage.model)
  frozen = dict.fromkeys(stage.kind.frozen, params)
  key = jax.eval_shape(lambda: jax.random.key(0))
  for step in stage.train_steps().values():
    new, metrics = jax.eval_shape(step, state, frozen, batch, key)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert metrics["loss"].shape == ()


def test_a_joint_stage_is_its_parts():
  stage = read(stages=("diffusion", "both"), both=tiny.JOINT).stages["both"]
  joint = stage.objectives["student"]
  assert joint.starts == (0, 2)
  consistency, matching = joint.objectives
  assert isinstance(consistency, objectives.ContinuousConsistency)
  assert isinstance(matching, objectives.SelfForcing)
  assert consistency.tangent_warmup == 2
  assert stage.kind.frozen == ("teacher", "real")
  assert stage.init["fake"] == "diffusion"
  _eval_step(stage)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(parts=("self_forcing", "joint")), r"`parts` .*got 'joint'"),
    (dict(parts=("bidirectional_diffusion",)), r"`parts` .*causal student"),
    (dict(self_forcing=dict(begin=1)), r"`config.both.objective.self_forcing"),
    (dict(mean_flow=dict()), r"`config.both.objective.mean_flow`"),
  ],
)
def test_a_wrong_part_is_found(changes, message):
  both = tiny.JOINT | dict(objective=tiny.JOINT["objective"] | changes)
  with pytest.raises(ValueError, match=message):
    read(stages=("diffusion", "both"), both=both)


def test_jumps_need_a_network_that_is_told_their_end():
  with pytest.raises(ValueError, match=r"needs `config.network.end_time=True`"):
    read(sampling=dict(solver="mean_flow"))


def test_a_student_that_jumps_is_rolled_out_so():
  stage = read(
    stages=("diffusion", "matching"),
    diffusion=tiny.DIFFUSION | dict(network=dict(end_time=True)),
    matching=tiny.SELF_FORCING
    | dict(network=dict(end_time=True), sampling=dict(solver="mean_flow")),
  ).stages["matching"]
  assert all(o.solver == "mean_flow" for o in stage.objectives.values())
  _eval_step(stage)


def test_a_network_gets_its_second_time_when_handed_over(trained):
  jumps = read(stages=("diffusion", "jumps"), jumps=tiny.MEAN_FLOW).stages
  before = Checkpoints(trained / "diffusion").read(4).state["ema"]
  after = jumps["jumps"].load_role("teacher", trained)
  assert not after["end_embedding"]["down"]["kernel"].any()
  del after["end_embedding"]
  jax.tree.map(np.testing.assert_array_equal, after, before)


def load(spec):
  return _experiment.read_experiment(_config.load_config(f"{CONFIGS}/{spec}"))


@pytest.mark.parametrize(
  "variant",
  [
    *("quickstart", "from_scratch", "gpu", "teachers", "runlocal"),
    *("staged", "staged_runlocal"),
  ],
)
def test_the_digits_configs_build(variant):
  experiment = load(f"moving_digits.py:{variant}")
  assert experiment.evaluation is not None


def test_the_digits_stages_trace():
  stages = load("moving_digits.py:from_scratch").stages
  stages |= {"discrete": load("moving_digits.py:staged").stages["discrete"]}
  for stage in stages.values():
    _eval_step(stage)


@pytest.mark.parametrize("variant", ["staged", "staged_runlocal"])
def test_the_digits_stages_follow_each_other(variant):
  """dCM -> sCM -> SF-DMD, one student handed on, one teacher for both."""
  stages = load(f"moving_digits.py:{variant}").stages
  names = list(stages)[-3:]
  assert names == ["discrete", "consistency", "self_forcing"]
  discrete, consistency, matching = (stages[name].init for name in names)
  assert discrete["student"] == discrete["teacher"] == consistency["teacher"]
  assert consistency["student"] == "discrete"
  assert matching["student"] == "consistency"


@pytest.mark.parametrize(
  "variant",
  [
    *("tf", "df", "tf_dcm,c1-4", "tf_scm,14b,c1-1"),
    *("sf_dmd,2step_noisy,c1-1", "tf_scm_sf_dmd,2step_noisy"),
  ],
)
def test_the_papers_stages_trace_at_full_size(variant):
  (stage,) = load(f"paper.py:{variant}").stages.values()
  _eval_step(stage)


def test_the_papers_stages_follow_each_other():
  stages = load("paper.py:all,14b").stages
  assert list(stages) == ["tf", "tf_scm", "sf_dmd"]
  assert stages["sf_dmd"].init["student"] == "tf_scm"
  with pytest.raises(ValueError, match=r"the variant must be one of"):
    load("paper.py:tf,2b")
  with pytest.raises(ValueError, match=r"the variant must be one of"):
    load("moving_digits.py:large")


def test_what_cannot_be_evaluated_says_why(tmp_path):
  folders = training.Folders(tmp_path, tmp_path)
  with pytest.raises(ValueError, match=r"`config.evaluation` is missing"):
    training.evaluate_experiment(read(), folders, command="")
  with pytest.raises(ValueError, match=r"`config.evaluation` needs a causal"):
    _evaluation._pattern(read())
