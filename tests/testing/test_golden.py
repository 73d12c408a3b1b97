"""The golden loader, and that the trimmed files hold every kind of case."""

import pathlib

import numpy as np
import pytest

from crcm_jax.testing import golden

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
# Those of the reference; wan_*.npz are of other implementations.
RECORDINGS = [f for f in GOLDEN.glob("*.npz") if not f.stem.startswith("wan_")]


def test_a_case_has_settings_arrays_and_gradients():
  case = golden.load(GOLDEN / "tf.npz", "bell_noisyctx1_c1-3")
  assert case.config["loss_weighting"] == "gaussian_bell"
  assert case.video("x0").shape == (2, 7, 4, 6, 4)
  np.testing.assert_array_equal(case.video("x0")[..., 1], case["x0"][:, 1])
  assert "draw/eps" in case
  assert "draw/nothing" not in case
  norms = [np.sum(g**2) for g in case.grads().values()]
  assert len(norms) == 69
  np.testing.assert_allclose(np.sqrt(sum(norms)), case["grad_norm"], rtol=1e-12)


def test_an_empty_name_loads_the_whole_file():
  case = golden.load(GOLDEN / "misc.npz")
  assert case["rf_t"].shape == (14,)
  assert case.config["adamw"]["eps"] == 1e-8
  assert case.grads() == {}


def test_a_case_without_settings_takes_the_files():
  weights = golden.load(GOLDEN / "weights.npz", "student")
  assert weights.config["dim"] == 32
  assert weights["patch_embedding.weight"].shape == (32, 16)


def test_unknown_names_are_answered_with_the_known_ones():
  with pytest.raises(ValueError, match=r"`case` must be one of .*none_c1-1"):
    golden.load(GOLDEN / "tf.npz", "nope")
  case = golden.load(GOLDEN / "tf.npz", "none_c1-1")
  with pytest.raises(KeyError, match=r"records no 'nope'; it has: .*draw/eps"):
    case["nope"]


def test_the_files_stay_small_and_keep_every_kind():
  size = sum(file.stat().st_size for file in RECORDINGS)
  assert size < 12e6
  kinds = {
    "tf": ["none", "bell", "noisyctx"],
    "df": ["random", "same", "fopp"],
    "tf_dcm": ["skip1", "skip2", "g1", "g3", "noisyctx"],
    "tf_scm": ["warm250", "noisyctx", "nan", "dscm"],
    "sf_dmd": ["default", "sched42", "g1", "g5"],
    "sf_dmd_noisyctx": ["noisyctx0", "noisyctx1", "sched41", "nan"],
    "critic": ["default", "sched42", "noisyctx"],
    "joint": ["noisyctx1_c1", "replayed"],
    "rcm_cm": ["scm", "rf_scm", "dcm_skip1", "dcm_skip2"],
    "rcm_dmd": ["dmd_1step", "randomt", "fixt", "critic", "sampler"],
    "samplers": ["student", "ode", "unipc", "analytic", "t2v", "i2v"],
    "attention": ["tf", "bc_", "bcq", "none"],
  }
  for file, wanted in kinds.items():
    names = golden.cases(GOLDEN / f"{file}.npz")
    for kind in wanted:
      assert any(kind in name for name in names), (file, kind)


def test_the_table_of_errors_has_a_row_for_every_case():
  page = (GOLDEN.parents[1] / "docs" / "parity.md").read_text("utf-8")
  single = ("weights", "weights_mid", "misc", "components", "masks")
  files = [f for f in RECORDINGS if f.stem not in single]
  assert len(files) == 15
  for file in files:
    for case in golden.cases(file):
      assert f"| `{file.stem}/{case}` |" in page, (file.stem, case)
  assert "| `masks` | 286 masks |" in page
