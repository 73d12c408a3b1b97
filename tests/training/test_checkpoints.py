import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.training._checkpoints import Checkpoints

CONFIG = {"seed": 0, "steps": 10, "network": {"width": 8}}


def state_of(step):
  return {"w": jnp.full((64, 8), float(step)), "step": jnp.int32(step)}


@pytest.fixture
def workdir(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, state_of(step), {"position": step}, CONFIG)
  checkpoints.close()
  return tmp_path


def truncate(workdir, step):
  folder = workdir / "checkpoints" / str(step) / "state"
  for file in folder.rglob("*"):
    if file.is_file():
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_the_newest_of_those_kept_is_restored(workdir):
  checkpoints = Checkpoints(workdir)
  assert checkpoints.steps() == [2, 3]
  restored = checkpoints.restore(state_of(0), CONFIG)
  assert restored is not None
  assert restored.step == 3
  assert restored.data == {"position": 3}
  np.testing.assert_array_equal(restored.state["w"], state_of(3)["w"])
  assert restored.state["step"].dtype == jnp.int32
  checkpoints.close()


def test_an_empty_workdir_restores_nothing(tmp_path):
  assert Checkpoints(tmp_path).restore(state_of(0), CONFIG) is None


def test_a_longer_run_may_continue_but_another_config_may_not(workdir):
  checkpoints = Checkpoints(workdir)
  assert checkpoints.restore(state_of(0), CONFIG | {"steps": 20}) is not None
  other = CONFIG | {"seed": 1, "network": {"width": 16}}
  message = (
    r"holds a checkpoint of another config, which differs in"
    r" `network.width`: 8 -> 16, `seed`: 0 -> 1. Choose another `--workdir`"
  )
  with pytest.raises(ValueError, match=message):
    checkpoints.restore(state_of(0), other)


def test_a_truncated_checkpoint_falls_back_and_says_so(workdir, caplog):
  truncate(workdir, 3)
  checkpoints = Checkpoints(workdir)
  restored = checkpoints.restore(state_of(0), CONFIG)
  assert restored is not None
  assert restored.step == 2
  assert "checkpoint of step 3" in caplog.text
  assert "is damaged: it was renamed to 3.damaged" in caplog.text
  checkpoints.save(3, state_of(33), {"position": 3}, CONFIG)
  checkpoints.close()
  again = Checkpoints(workdir).restore(state_of(0), CONFIG)
  assert again is not None
  assert again.state["w"][0, 0] == 33.0


def test_a_half_written_checkpoint_is_not_seen(workdir):
  folder = pathlib.Path(workdir / "checkpoints")
  (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
  restored = Checkpoints(workdir).restore(state_of(0), CONFIG)
  assert restored is not None
  assert restored.step == 2


def test_only_damaged_checkpoints_are_an_error_and_are_kept(workdir):
  for step in (2, 3):
    truncate(workdir, step)
  with pytest.raises(ValueError, match=r"none of \[3, 2\] in .* can be read"):
    Checkpoints(workdir).restore(state_of(0), CONFIG)
  assert Checkpoints(workdir).steps() == [2, 3]


def test_reading_one_for_another_use_names_what_there_is(workdir):
  checkpoints = Checkpoints(workdir)
  assert checkpoints.read(2).state["w"][0, 0] == 2.0
  assert checkpoints.read(None).step == 3
  with pytest.raises(
    ValueError, match=r"no checkpoint of step 1 in .*\[2, 3\]"
  ):
    checkpoints.read(1)
  truncate(workdir, 3)
  with pytest.raises(ValueError, match=r"of step 3 in .* is damaged"):
    Checkpoints(workdir).read(None)


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  step = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
  checkpoints = Checkpoints(tmp_path, keep=1)
  state = {"w": jnp.zeros((512, 512))}
  checkpoints.save(1, state, {}, CONFIG)
  for _ in range(5):
    state = step(state)
  checkpoints.close()
  assert float(Checkpoints(tmp_path).read(1).state["w"].max()) == 0.0


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match=r"`keep` must be at least 1; got 0"):
    Checkpoints(tmp_path, keep=0)
