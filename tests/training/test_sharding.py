import jax
import jax.numpy as jnp
import pytest

from crcm_jax.training import sharding

TREE = {"blocks": {"kernel": jnp.zeros((2, 4, 4)), "bias": jnp.zeros(4)}}
RULES = ((".*/kernel", (None, "fsdp", "tensor")), (".*", ()))


def test_the_first_rule_that_matches_decides():
  placed = sharding.shard(TREE, sharding.make_mesh(), RULES)["blocks"]
  assert tuple(placed["kernel"].spec) == (None, "fsdp", "tensor")
  assert tuple(placed["bias"].spec) == ()
  text = "1 arrays replicated, 1 arrays (None, 'fsdp', 'tensor')"
  assert sharding.describe(placed) == text


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


def test_a_mesh_has_no_more_devices_than_there_are():
  with pytest.raises(ValueError, match=rf"at most {len(jax.devices())} devi"):
    sharding.make_mesh(data=512)


def test_a_lone_process_reads_all_rows():
  mesh = sharding.make_mesh()
  assert sharding.local_rows(mesh, 3) == (0, 1, 2)


def test_what_is_placed_can_be_fetched():
  placed = sharding.shard(TREE, sharding.make_mesh(), RULES)
  tree = sharding.place(TREE, placed)
  assert jax.tree.map(lambda a: a.sharding, tree) == placed
  assert sharding.fetch(tree["blocks"]["kernel"]).shape == (2, 4, 4)
