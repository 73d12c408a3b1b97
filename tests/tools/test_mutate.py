"""The mistakes of the mutation script can still be planted."""

import collections
import pathlib
import runpy
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_every_mistake_fits_the_code(monkeypatch, capsys):
  monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
  mutate = runpy.run_path(str(ROOT / "tools" / "mutate.py"))
  assert mutate["main"](["--list"]) == 0, capsys.readouterr().err
  mutations = mutate["MUTATIONS"]
  assert len(mutations) > 60
  for mutation in mutations:
    assert (ROOT / mutation.tests).exists(), mutation.tests
    assert mutation.new != mutation.old
  whys = collections.Counter((m.file, m.why) for m in mutations)
  assert max(whys.values()) == 1, whys.most_common(1)


def test_a_mistake_that_does_not_fit_is_named(monkeypatch):
  monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
  mutate = runpy.run_path(str(ROOT / "tools" / "mutate.py"))
  lost = mutate["Mutation"]("why", "paths.py", "nowhere", "anywhere", "tests")
  assert "there 0 times, not once" in next(mutate["_misfit"](lost))
