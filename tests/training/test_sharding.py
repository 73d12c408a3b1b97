import jax
import jax.numpy as jnp
import parallel_steps
import pytest
import tiny

from crcm_jax import kernels, models, training
from crcm_jax.training import (
  _mesh_checks,
  _networks,
  _rules,
  read_stage,
  sharding,
)

TREE = {"blocks": {"kernel": jnp.zeros((2, 4, 4)), "bias": jnp.zeros(4)}}
RULES = ((".*/kernel", (None, "fsdp", "tensor")), (".*", ()))


def test_the_first_rule_that_matches_decides():
  placed = sharding.shard(TREE, sharding.make_mesh(), RULES)["blocks"]
  assert tuple(placed["kernel"].spec) == (None, "fsdp", "tensor")
  assert tuple(placed["bias"].spec) == ()


def test_a_run_says_what_its_rules_split():
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
  tree = {
    "blocks": {"kernel": jax.ShapeDtypeStruct((2**10, 2**10, 2**10), "f4")}
  }
  tree["counter"] = jax.ShapeDtypeStruct((), "i4")
  on = lambda mesh: sharding.with_shardings(
    tree, sharding.shard(tree, mesh, RULES)
  )
  place = sharding.Placement.for_heads(mesh, 12)
  assert sharding.describe(on(mesh), RULES, place).splitlines() == [
    "mesh data 1 x fsdp 2 x context 2 x tensor 2",
    "  (None, 'fsdp', 'tensor'): 1 arrays, 1.00 GiB a device, by '.*/kernel'",
    "  whole: 1 arrays, 0.00 GiB a device, by '.*'",
    "  (None, ('data', 'fsdp'), None, None, 'tensor'): a rollout's cache,"
    " [layers b f p n d]",
  ]
  alone = jax.sharding.AbstractMesh((1, 1, 1, 1), sharding.AXES)
  assert sharding.describe(on(alone), RULES) == (
    "mesh data 1 x fsdp 1 x context 1 x tensor 1: everything on one device"
  )


def test_moments_follow_their_parameters_and_counters_are_whole():
  tree = {"mu": TREE, "count": jnp.zeros((), jnp.int32)}
  rules = (*RULES[:1], (".*", ("fsdp",)))
  placed = sharding.shard(tree, sharding.make_mesh(), rules)
  kernel = placed["mu"]["blocks"]["kernel"]
  assert tuple(kernel.spec) == (None, "fsdp", "tensor")
  assert tuple(placed["count"].spec) == ()


def test_a_batch_lies_along_data_and_fsdp():
  batch = sharding.place_batch({"x": jnp.zeros((4, 3))}, sharding.make_mesh())
  assert tuple(batch["x"].sharding.spec) == (("data", "fsdp"),)


def test_rules_must_fit_and_match_every_leaf():
  mesh = sharding.make_mesh()
  with pytest.raises(ValueError, match=r"none matches 'blocks/bias'"):
    sharding.shard(TREE, mesh, RULES[:1])
  with pytest.raises(ValueError, match=r"blocks/bias at most 1 axes; got"):
    sharding.shard(TREE, mesh, ((".*", (None, "fsdp")),))


def test_an_axis_left_out_takes_the_devices_that_the_others_leave():
  sizes = dict(data=None, fsdp=2, context=2, tensor=1)
  filled = dict(data=2, fsdp=2, context=2, tensor=1)
  assert _mesh_checks.fill(sizes, 8) == filled
  assert sharding.make_mesh().shape == dict.fromkeys(sharding.AXES, 1)


@pytest.mark.parametrize("data", [3, 16, None])
def test_a_mesh_must_multiply_to_the_devices(data):
  sizes = dict(data=data, fsdp=3, context=1, tensor=1)
  message = (
    r"`mesh` must multiply to the number of devices, 8; got .*fsdp 3 x context"
    r" 1 x tensor 1 = .*`mesh.data` to None .* or `mesh.devices` to use fewer"
  )
  with pytest.raises(ValueError, match=message):
    _mesh_checks.fill(sizes, 8)


def test_a_mesh_has_only_devices_that_there_are():
  there = len(jax.devices())
  with pytest.raises(ValueError, match=rf"number of devices, {there}; got dat"):
    sharding.make_mesh(data=512)
  with pytest.raises(ValueError, match=rf"between 1 and {there}, .* got 512"):
    sharding.make_mesh(devices=512)
  with pytest.raises(ValueError, match=r"`mesh.fsdp` must be at least 1 dev"):
    sharding.make_mesh(fsdp=0)


def test_a_lone_process_reads_all_rows():
  mesh = sharding.make_mesh()
  assert sharding.local_rows(mesh, 3) == (0, 1, 2)


def test_what_is_placed_can_be_fetched():
  placed = sharding.shard(TREE, sharding.make_mesh(), RULES)
  tree = sharding.place(TREE, placed)
  assert jax.tree.map(lambda a: a.sharding, tree) == placed
  assert sharding.fetch(tree["blocks"]["kernel"]).shape == (2, 4, 4)


WAN = models.WAN_1_3B
VIDEO = (8, 21, 60, 104, 16)  # 1,560 tokens a frame


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    (
      dict(data=4, fsdp=4),
      r"`data.batch_size` must divide by .* 4 x 4 = 16; got 8. Change the batc",
    ),
    (
      dict(tensor=8),
      r"`mesh.tensor` must divide the 12 heads of the network; got 8. Give the",
    ),
    (
      dict(context=16),
      r"`mesh.context` must divide the 1560 tokens of a latent frame.*got 16. 1"
      r"5 divides them; give the other",
    ),
  ],
)
def test_sizes_must_divide_by_their_devices(mesh, message):
  whole = dict.fromkeys(sharding.AXES, 1)
  sharding.check_stage(whole | dict(data=8, context=8), WAN, VIDEO)
  with pytest.raises(ValueError, match=message):
    sharding.check_stage(whole | mesh, WAN, VIDEO)


@pytest.mark.parametrize(
  ("micro_batches", "data", "message"),
  [
    (3, 1, r"`loop.micro_batches` must divide `data.batch_size`, 8; got 3. Ch"),
    (
      4,
      4,
      r"`loop.micro_batches` must leave .* 4 x 1 = 4; got 4, of 2 examples"
      r" each. Set it to 2 or a divisor",
    ),
  ],
)
def test_every_micro_batch_must_divide_too(micro_batches, data, message):
  mesh = dict.fromkeys(sharding.AXES, 1) | dict(data=data)
  sharding.check_stage(mesh, WAN, VIDEO, 2)
  with pytest.raises(ValueError, match=message):
    sharding.check_stage(mesh, WAN, VIDEO, micro_batches)


def test_a_stage_checks_its_micro_batches(tmp_path):
  stage = tiny.stage(loop=dict(micro_batches=4))
  folders = training.Folders(tmp_path, tmp_path)
  with pytest.raises(ValueError, match=r"divide `data.batch_size`, 2; got 4"):
    training.train_stage(stage, folders)


def test_a_stage_is_checked_before_anything_is_compiled(tmp_path):
  stage = tiny.stage(mesh=dict(data=3))
  folders = training.Folders(tmp_path, tmp_path)
  with pytest.raises(ValueError, match=r"`mesh` must multiply to the num"):
    training.train_stage(stage, folders)
  assert not list(tmp_path.iterdir())


def spec(name, setting):
  rules = sharding.read_rules(setting)
  return tuple(_rules.spec_of(name, rules))


def test_rules_split_the_layers_of_a_wan_and_what_follows_them():
  shapes = _networks.param_shapes(tiny.stage().model)
  tree = {"student": shapes, "student_opt_state": {"mu": shapes}, "ema": shapes}
  placed = sharding.shard(tree, sharding.make_mesh(), sharding.WAN_RULES)
  kernels = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), tuple(a.spec))
    for path, a in jax.tree.leaves_with_path(placed)
  ]
  split = {name for name, axes in kernels if "fsdp" in axes}
  assert split == {n for n, _ in kernels if "/blocks/" in n and "kernel" in n}
  assert len(split) == 3 * 10


def test_each_role_may_have_rules_of_its_own():
  own = dict(real=((".*kernel", ("data",)), (".*", ())), fake="replicated")
  name = "blocks/ffn/up/kernel"
  assert spec(f"real/{name}", own) == ("data",)
  assert spec(f"fake_opt_state/0/mu/{name}", own) == ()
  for role in ("student", "ema", "student_opt_state/0/mu", "teacher"):
    assert spec(f"{role}/{name}", own) == (None, "fsdp", "tensor")
  assert spec("skipped", own) == ()
  with pytest.raises(ValueError, match=r"name one of \['student', 'fake', "):
    sharding.read_rules(dict(critic="wan"))
  with pytest.raises(ValueError, match=r"one of \['replicated', 'wan'\]; got"):
    sharding.read_rules("wann")
  for rule, why in ((("*", ()), "nothing to repeat"), ((".*",), "unpack")):
    with pytest.raises(ValueError, match=rf"`config.sharding` must.*{why}"):
      sharding.read_rules((rule,))


def test_a_mask_must_keep_frames_whole():
  mesh = jax.sharding.AbstractMesh((1, 1, 4, 1), sharding.AXES)
  attention = sharding.ParallelAttention(mesh)
  q = jax.ShapeDtypeStruct((1, 2, 8, 2, 4), jnp.float32)
  mask = kernels.BlockMask.block_causal((0, 4, 16))
  with pytest.raises(ValueError, match=r"rows of whole frames, of 8 tok"):
    jax.eval_shape(lambda q: attention(q, q, q, mask=mask), q)
  with pytest.raises(ValueError, match=r"must all have the token axes \[f p\]"):
    jax.eval_shape(lambda q: attention(q[:, 0], q, q), q)


def test_a_lean_cache_lies_by_heads_where_they_divide():
  mesh = jax.sharding.AbstractMesh((1, 1, 4, 2), sharding.AXES)
  for heads, lean, axes in (
    (16, True, (None, None, ("tensor", "context"))),
    (12, True, (None, "context", "tensor")),
    (16, False, (None, None, "tensor")),
    (12, False, (None, None, "tensor")),
  ):
    rules = sharding.Placement.for_heads(mesh, heads, lean=lean).rules
    assert tuple(_rules.spec_of("cache/past/keys", rules))[2:] == axes


@pytest.mark.parametrize("lean", [False, True])
def test_a_stage_says_whether_its_rollouts_are_lean(lean, monkeypatch):
  name = "self_forcing, lean rollouts" if lean else "self_forcing"
  stage, asked = read_stage("stage", parallel_steps.config(name)), []
  monkeypatch.setattr(
    sharding,
    "shard_model",
    lambda model, mesh, *, lean: asked.append(lean) or model,
  )
  stage.on(sharding.make_mesh(devices=1))
  assert asked == [lean] * 3  # student, real, fake
  assert {o.unroll for o in stage.objectives.values()} == {not lean}


def test_a_stage_says_whether_its_rollouts_unroll():
  config = parallel_steps.config("self_forcing")
  config["loop"] = dict(unroll_rollouts=False)
  stage = read_stage("stage", config)
  assert [o.unroll for o in stage.objectives.values()] == [False, False]


@pytest.mark.parametrize("lean", [False, True])
def test_a_rollout_gathers_the_network_unless_lean(lean):
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
  place = sharding.Placement.for_heads(mesh, 12, lean=lean)
  params = {"blocks": {"ffn": {"up": {"kernel": jnp.ones((2, 8, 8))}}}}
  traced = jax.make_jaxpr(lambda p: place("network", p))(params)
  specs = [tuple(e.params["sharding"].spec) for e in traced.eqns]
  assert specs == ([] if lean else [(None, None, "tensor")])


def test_layers_that_lie_apart_are_gathered_one_by_one():
  mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), sharding.AXES)
  place = sharding.Placement.for_heads(mesh, 12)
  linear = dict(kernel=jnp.ones((2, 8, 8)), bias=jnp.ones((2, 8)))
  layers = dict(
    self_attention=dict(
      **dict.fromkeys(("query", "key", "value"), linear),
      out=dict(kernel=jnp.ones((2, 8, 8))),
    ),
    cross_norm=dict(bias=jnp.ones((2, 8))),
  )
  params = models.unstack_layers(dict(blocks=layers, head=jnp.ones(8)))
  traced = jax.make_jaxpr(lambda p: place("network", p))(params)
  specs = [tuple(e.params["sharding"].spec) for e in traced.eqns]
  joined = [(None, "tensor"), (None, None, "tensor")]  # bias [3 m], [m 3 m]
  of_layer = [(), ("tensor",), *joined]
  assert specs == [*of_layer, *of_layer, ()]
