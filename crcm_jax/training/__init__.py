"""Training: state, objectives, train step, and the loop around them."""

from crcm_jax.training import objectives as objectives
from crcm_jax.training._counters import Alternation as Alternation
from crcm_jax.training._counters import Counters as Counters
from crcm_jax.training._counters import step_counts as step_counts
from crcm_jax.training._ema import ema_beta as ema_beta
from crcm_jax.training._ema import ema_exponent as ema_exponent
from crcm_jax.training._ema import ema_update as ema_update
from crcm_jax.training._optimizer import adamw as adamw
from crcm_jax.training._state import init_state as init_state
from crcm_jax.training._state import TrainState as TrainState
from crcm_jax.training._step import make_train_step as make_train_step
from crcm_jax.training._step import Shardings as Shardings
from crcm_jax.training._step import TrainStep as TrainStep
