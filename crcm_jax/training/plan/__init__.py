"""Plans of train steps: memory, work and time without the hardware.

    prepare(topology := parse_topology("v5e:4x4"))
    plan = plan_step(stage, "student", topology)

`crcm plan` prints them.
"""

from crcm_jax.training.plan._chips import Chip as Chip
from crcm_jax.training.plan._chips import CHIPS as CHIPS
from crcm_jax.training.plan._chips import parse_topology as parse_topology
from crcm_jax.training.plan._chips import Topology as Topology
from crcm_jax.training.plan._compile import mesh_shape as mesh_shape
from crcm_jax.training.plan._compile import prepare as prepare
from crcm_jax.training.plan._hlo import Moved as Moved
from crcm_jax.training.plan._hlo import Traffic as Traffic
from crcm_jax.training.plan._memory import Memory as Memory
from crcm_jax.training.plan._plan import as_json as as_json
from crcm_jax.training.plan._plan import plan_step as plan_step
from crcm_jax.training.plan._plan import Roofline as Roofline
from crcm_jax.training.plan._plan import StepPlan as StepPlan
from crcm_jax.training.plan._report import report as report
from crcm_jax.training.plan._suggest import Change as Change
from crcm_jax.training.plan._suggest import suggest as suggest
