"""The paper's settings compile for, and fit, the TPUs they are planned on.

Table 3: stage 1 in both sizes, stages 2 and 3 with teachers of 14B.
"""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from crcm_jax import training
from crcm_jax.training import plan

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _cache_again():
  """`prepare` turns the cache of compiled programs off."""
  yield
  jax.config.update("jax_enable_compilation_cache", True)
  compilation_cache.reset_cache()


@pytest.mark.parametrize(
  "variant",
  [
    "tf,v5p-128",
    "tf,14b,v5p-64",
    "tf_scm,14b_teachers,v5p-32",
    "sf_dmd,14b_teachers,v5p-64",
  ],
)
def test_a_setting_fits_its_planned_topology(variant):
  pytest.importorskip("libtpu")
  config = training.load_config(f"experiments/configs/paper.py:{variant}")
  experiment = training.read_experiment(config)
  topology = plan.parse_topology(experiment.topology)
  plan.prepare(topology)
  for stage in experiment.stages.values():
    for phase in stage.objectives:
      found = plan.plan_step(stage, phase, topology)
      assert found.fits, plan.report(stage, phase, topology, found)
