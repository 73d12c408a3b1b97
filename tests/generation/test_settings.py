"""Schedules of a video, and everything that can be wrong with one."""

import numpy as np
import pytest

from crcm_jax import models, sampling
from crcm_jax.chunks import ChunkPattern
from crcm_jax.generation import Settings

FIRST = 1600 / 1601
WHOLE, SINGLE = ChunkPattern(3, 3), ChunkPattern(1, 1)


def test_few_step_schedules_are_those_of_training():
  settings = Settings(pattern=SINGLE, steps=(4, 2))
  np.testing.assert_allclose(
    settings.schedules[0], (FIRST, 15 / 16, 5 / 6, 5 / 8, 0)
  )
  np.testing.assert_allclose(settings.schedules[1], (FIRST, 5 / 6, 0))
  noisy = Settings(pattern=SINGLE, steps=(4, 2), noisy_context=1)
  np.testing.assert_allclose(noisy.schedules[1], (FIRST, 5 / 8, 0))
  assert noisy.schedules[0] == settings.schedules[0]
  own = Settings(pattern=SINGLE, mid_times=((0.9, 0.7), (0.8,), ()))
  assert own.steps == (3, 2, 1)
  np.testing.assert_allclose(own.schedules[0], (FIRST, 0.9, 0.7, 0))


def test_what_is_left_out_is_the_usual():
  both_ways = Settings()
  assert (both_ways.solver, both_ways.steps) == ("unipc", (50,))
  assert both_ways.guidance == 5
  np.testing.assert_array_equal(
    both_ways.schedules[0], sampling.ode_schedule(50)
  )
  student = Settings(pattern=WHOLE)
  assert (student.solver, student.steps) == ("few_step", (4,))
  assert student.guidance == 1
  teacher = Settings(pattern=WHOLE, solver="euler")
  assert (teacher.steps, teacher.guidance) == ((50,), 3)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(solver="few_step"), "`solver` must be few_step or euler with"),
    (dict(solver="unipc", pattern=WHOLE), "`solver` must be few_step or"),
    (dict(solver="heun"), "`solver` must be one of"),
    (dict(steps=(4, 2)), "`steps` must be one number for unipc"),
    (dict(pattern=WHOLE, steps=(3,)), "Give `mid_times` for other"),
    (dict(pattern=WHOLE, steps=(0,)), "`steps` must be at least 1"),
    (
      dict(pattern=WHOLE, steps=(4,), mid_times=((0.5,),)),
      "`mid_times` must have one time fewer",
    ),
    (
      dict(pattern=WHOLE, mid_times=((0.5, 0.8),)),
      "`mid_times` must decrease",
    ),
    (dict(noisy_context=1), "`noisy_context` must come with few-step"),
  ],
  ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_settings_that_do_not_fit_each_other(settings, message, unchecked):
  with pytest.raises(ValueError, match=message):
    Settings(**settings)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(width=830), "`width` must be divisible by 16.*816 and 832"),
    (dict(height=8), "`height` must be divisible by 16"),
    (dict(height=0), "`height` must be divisible by 16"),
    (dict(frames=80), r"`frames` must be 4k \+ 1.*77 and 81"),
    (dict(frames=0), r"`frames` must be 4k \+ 1"),
    (
      dict(frames=77, pattern=WHOLE),
      "`frames` must fill whole chunks.*20 of them.*69 and 81",
    ),
    (dict(frames=5, pattern=WHOLE), "Near it are 9 and 21"),
  ],
  ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_sizes_that_networks_cannot_make(settings, message):
  with pytest.raises(ValueError, match=message):
    Settings(**settings).latent_shape(models.WAN_VAE, models.WAN_1_3B)


def test_the_usual_size():
  settings = Settings()
  shape = settings.latent_shape(models.WAN_VAE, models.WAN_1_3B)
  assert shape == (21, 60, 104, 16)
