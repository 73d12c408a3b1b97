"""Training losses as pure functions of arrays and velocity functions.

Each returns `(per_example [b], metrics)` and is deterministic: noise and times
are arguments. None needs a network library.
"""

from crcm_jax.losses._continuous_consistency import (
  continuous_consistency_loss as continuous_consistency_loss,
)
from crcm_jax.losses._continuous_consistency import (
  ContinuousConsistencyMetrics as ContinuousConsistencyMetrics,
)
from crcm_jax.losses._continuous_consistency import (
  mean_flow_loss as mean_flow_loss,
)
from crcm_jax.losses._continuous_consistency import (
  TANGENT_STEP as TANGENT_STEP,
)
from crcm_jax.losses._continuous_consistency import TangentPass as TangentPass
from crcm_jax.losses._continuous_consistency import (
  trigflow_continuous_consistency_loss as trigflow_continuous_consistency_loss,
)
from crcm_jax.losses._discrete_consistency import (
  discrete_consistency_loss as discrete_consistency_loss,
)
from crcm_jax.losses._discrete_consistency import (
  DiscreteConsistencyMetrics as DiscreteConsistencyMetrics,
)
from crcm_jax.losses._discrete_consistency import (
  trigflow_discrete_consistency_loss as trigflow_discrete_consistency_loss,
)
from crcm_jax.losses._distribution_matching import (
  distribution_matching_loss as distribution_matching_loss,
)
from crcm_jax.losses._distribution_matching import (
  distribution_matching_target as distribution_matching_target,
)
from crcm_jax.losses._distribution_matching import (
  DistributionMatchingMetrics as DistributionMatchingMetrics,
)
from crcm_jax.losses._distribution_matching import (
  target_matching_loss as target_matching_loss,
)
from crcm_jax.losses._examples import finite_examples as finite_examples
from crcm_jax.losses._examples import zero_examples as zero_examples
from crcm_jax.losses._flow_matching import critic_loss as critic_loss
from crcm_jax.losses._flow_matching import (
  flow_matching_loss as flow_matching_loss,
)
from crcm_jax.losses._flow_matching import (
  FlowMatchingMetrics as FlowMatchingMetrics,
)
from crcm_jax.losses._flow_matching import (
  gaussian_bell_weight as gaussian_bell_weight,
)
from crcm_jax.losses._regression import regression_loss as regression_loss
from crcm_jax.losses._regression import RegressionMetrics as RegressionMetrics
