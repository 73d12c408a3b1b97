"""One objective per stage: what is drawn, and the loss of what was drawn."""

from crcm_jax.training.objectives._objective import Objective as Objective
