import errno
import hashlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcm_jax.training import _checkpoints, _manifest, _versions
from crcm_jax.training._checkpoints import Checkpoints, NotSaved

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


def files_of(workdir, step):
  """Lists the files of a checkpoint, the list of hashes among them."""
  folder = workdir / "checkpoints" / str(step)
  return sorted(path for path in folder.rglob("*") if path.is_file())


def truncate(workdir, step):
  for file in files_of(workdir, step):
    if file.name != "SHA256SUMS":
      file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def restore(workdir):
  checkpoints = Checkpoints(workdir)
  restored = checkpoints.restore(state_of(0), CONFIG)
  checkpoints.close()
  return restored


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
  assert "is damaged (changed since written: " in caplog.text
  assert "it was renamed to 3.damaged, and the run goes on" in caplog.text
  checkpoints.save(3, state_of(33), {"position": 3}, CONFIG)
  checkpoints.close()
  again = Checkpoints(workdir).restore(state_of(0), CONFIG)
  assert again is not None
  assert again.state["w"][0, 0] == 33.0


def test_a_flipped_bit_in_any_file_is_found_and_named(workdir, caplog):
  rng = random.Random(0)
  files = files_of(workdir, 3)
  assert len(files) > 10
  aside = workdir / "checkpoints" / "3.damaged"
  for file in files * 2:
    whole = bytearray(file.read_bytes())
    where, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
    whole[where] ^= bit
    file.write_bytes(whole)
    caplog.clear()
    restored = restore(workdir)
    assert restored is not None
    assert restored.step == 2, file
    assert "checkpoint of step 3" in caplog.text
    if file.name != "SHA256SUMS":  # of which any line may be the wrong one
      assert str(file.relative_to(workdir / "checkpoints" / "3")) in caplog.text
    aside.rename(workdir / "checkpoints" / "3")
    whole[where] ^= bit
    file.write_bytes(whole)
  assert restore(workdir).step == 3


def test_the_list_of_hashes_is_that_of_sha256sum(workdir):
  folder = workdir / "checkpoints" / "3"
  lines = (folder / "SHA256SUMS").read_text().splitlines()
  assert len(lines) == len(files_of(workdir, 3)) - 1
  for line in lines:
    digest, name = line.split("  ")
    assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("seed", range(4))
def test_a_half_deleted_checkpoint_is_found_and_named(workdir, caplog, seed):
  files = files_of(workdir, 3)
  for file in random.Random(seed).sample(files, len(files) // 2):
    file.unlink()
  assert restore(workdir).step == 2
  assert "checkpoint of step 3" in caplog.text
  assert "(lost)" in caplog.text or "has no SHA256SUMS" in caplog.text


def test_an_added_file_is_found(workdir, caplog):
  (workdir / "checkpoints" / "3" / "state" / "new").touch()
  assert restore(workdir).step == 2
  assert "changed since written: state/new" in caplog.text


def test_a_half_written_checkpoint_is_not_seen_and_goes_away(workdir):
  folder = workdir / "checkpoints"
  (folder / "3").rename(folder / "3.orbax-checkpoint-tmp")
  (folder / "1.removed").mkdir()
  assert Checkpoints(workdir).read(None).step == 2
  assert (folder / "3.orbax-checkpoint-tmp").exists()  # it may be another's
  assert restore(workdir).step == 2
  assert [path.name for path in folder.iterdir()] == ["2"]


def test_a_checkpoint_without_a_list_is_unfinished(workdir, caplog):
  folder = workdir / "checkpoints"
  (folder / "3" / "SHA256SUMS").unlink()
  assert Checkpoints(workdir).steps() == [2]
  assert restore(workdir).step == 2
  assert "step 3" in caplog.text
  assert "is unfinished (it has no SHA256SUMS)" in caplog.text
  assert (folder / "3.unfinished").is_dir()
  (folder / "2" / "SHA256SUMS").unlink()
  assert restore(workdir) is None  # cut off in its first checkpoint


def test_only_damaged_checkpoints_are_an_error_and_are_kept(workdir):
  for step in (2, 3):
    truncate(workdir, step)
  with pytest.raises(ValueError, match=r"steps \[3, 2\] in .* all damaged"):
    Checkpoints(workdir).restore(state_of(0), CONFIG)
  assert Checkpoints(workdir).steps() == [2, 3]


def test_a_whole_one_that_does_not_fit_is_refused_and_kept(workdir):
  like = {"w": jnp.zeros((64, 9)), "other": jnp.int32(0)}
  with pytest.raises(ValueError, match=r"step 3 in .* is whole but cannot be"):
    Checkpoints(workdir).restore(like, CONFIG)
  assert Checkpoints(workdir).steps() == [2, 3]


def test_milestones_are_never_removed(tmp_path):
  checkpoints = Checkpoints(tmp_path, keep=1, milestone_every=4)
  for step in range(2, 15, 2):
    checkpoints.save(step, state_of(step), {}, CONFIG)
  checkpoints.close()
  assert Checkpoints(tmp_path).steps() == [4, 8, 12, 14]
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"4", "8", "12", "14"}


def test_the_old_one_stays_until_the_new_one_is_listed(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path, keep=1)
  checkpoints.save(1, state_of(1), {}, CONFIG)
  checkpoints.wait()
  seen = []
  write = _manifest.write
  monkeypatch.setattr(
    _manifest,
    "write",
    lambda folder: (seen.append(checkpoints.steps()), write(folder)),
  )
  checkpoints.save(2, state_of(2), {}, CONFIG)
  checkpoints.close()
  assert seen == [[1]]
  assert Checkpoints(tmp_path).steps() == [2]


def test_other_versions_are_told(workdir, caplog, monkeypatch):
  other = {"crcm_jax": "9", "jax": "9"}
  monkeypatch.setattr(_checkpoints, "versions", lambda: other)
  assert restore(workdir).versions["jax"] == jax.__version__
  assert "written by {'crcm_jax': " in caplog.text
  assert "perhaps not to the same bits" in caplog.text


def test_changed_code_is_another_version(tmp_path):
  package, linked = tmp_path / "package", tmp_path / "linked"
  for folder in (package, linked):
    folder.mkdir()
    (folder / "module.py").write_text("x = 1")
  (package / "folder").symlink_to(linked)
  seen = {_versions.source_hash(package)}
  (package / "notes.txt").write_text("no code")
  assert _versions.source_hash(package) in seen
  (linked / "module.py").write_text("x = 2")
  assert _versions.source_hash(package) not in seen


def test_a_write_that_fails_is_reported_once_it_is_known(tmp_path, monkeypatch):
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(1, state_of(1), {}, CONFIG)
  checkpoints.wait()

  def fail(folder):
    raise OSError(errno.ENOSPC, "No space left on device", str(folder))

  monkeypatch.setattr(_manifest, "write", fail)
  checkpoints.save(2, state_of(2), {}, CONFIG)
  message = (
    r"step 2 could not be written to .*checkpoints \(.*No space left"
    r".*\); those of steps \[1\] are as they were. See that there is room"
  )
  with pytest.raises(NotSaved, match=message):
    checkpoints.wait()
  checkpoints.check()  # once
  checkpoints.close()


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


def test_a_part_is_read_alone(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  state = {"ema": {"w": jnp.ones((2, 3))}, "student": {"w": jnp.zeros(())}}
  checkpoints.save(1, state, {}, CONFIG)
  checkpoints.wait()
  read = checkpoints.read(None, only="ema").state
  assert read.keys() == {"ema"}
  assert isinstance(read["ema"]["w"], np.ndarray)
  np.testing.assert_array_equal(read["ema"]["w"], np.ones((2, 3)))
  assert checkpoints.read(None).state.keys() == state.keys()
  checkpoints.close()


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
  with pytest.raises(ValueError, match=r"`milestone_every` must be at least 0"):
    Checkpoints(tmp_path, milestone_every=-1)
