"""Time grids against the reference, and the errors of bad ones."""

import parity
import pytest
from parity import GOLDEN

from crcm_jax import sampling
from crcm_jax.testing import golden

MISC = golden.load(GOLDEN / "misc.npz")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_few_step_grids_match_the_reference(steps):
  # The reference truncates one list of midpoints.
  grid = sampling.few_step_schedule(sampling.MID_TIMES["4"][: steps - 1])
  parity.check("misc", name := f"few_step_t_{steps}", grid, MISC[name])


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("steps", [4, 10, 50])
def test_ode_grids_match_the_reference(steps):
  grid = sampling.ode_schedule(steps)
  parity.check("misc", name := f"shifted_ode_t_{steps}", grid, MISC[name])


def test_grids_that_do_not_decrease_are_refused():
  for mid in [(0.5, 0.5), (0.5, 0.6), (1.0,), (0.0,)]:
    with pytest.raises(ValueError, match="`mid_times` must decrease within"):
      sampling.few_step_schedule(mid)


def test_settings_without_meaning_are_refused():
  with pytest.raises(ValueError, match="`steps` must be at least 1"):
    sampling.ode_schedule(0)
  with pytest.raises(ValueError, match="`shift` must be positive"):
    sampling.ode_schedule(4, shift=0.0)
  with pytest.raises(ValueError, match="`sigma_max` must be positive"):
    sampling.ode_schedule(4, sigma_max=0.0)
