"""One objective per stage: what is drawn, and the loss of what was drawn."""

from crcm_jax.training.objectives._bidirectional_diffusion import (
  BidirectionalDiffusion as BidirectionalDiffusion,
)
from crcm_jax.training.objectives._continuous_consistency import (
  ContinuousConsistency as ContinuousConsistency,
)
from crcm_jax.training.objectives._diffusion_forcing import (
  DiffusionForcing as DiffusionForcing,
)
from crcm_jax.training.objectives._discrete_consistency import (
  DiscreteConsistency as DiscreteConsistency,
)
from crcm_jax.training.objectives._joint import Joint as Joint
from crcm_jax.training.objectives._mean_flow import MeanFlow as MeanFlow
from crcm_jax.training.objectives._objective import Masked as Masked
from crcm_jax.training.objectives._objective import Objective as Objective
from crcm_jax.training.objectives._ode_regression import (
  BidirectionalOdeRegression as BidirectionalOdeRegression,
)
from crcm_jax.training.objectives._ode_regression import (
  OdeRegression as OdeRegression,
)
from crcm_jax.training.objectives._self_forcing import Critic as Critic
from crcm_jax.training.objectives._self_forcing import (
  SelfForcing as SelfForcing,
)
from crcm_jax.training.objectives._teacher_forcing import (
  TeacherForcing as TeacherForcing,
)
