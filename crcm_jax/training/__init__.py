"""Training: state, objectives, train step, and the loop around them."""

from crcm_jax.training import flops as flops
from crcm_jax.training import objectives as objectives
from crcm_jax.training import sharding as sharding
from crcm_jax.training._agreement import check_start as check_start
from crcm_jax.training._arguments import step_arguments as step_arguments
from crcm_jax.training._arguments import StepArguments as StepArguments
from crcm_jax.training._checkpoints import Checkpoints as Checkpoints
from crcm_jax.training._checkpoints import Restored as Restored
from crcm_jax.training._config import config_hash as config_hash
from crcm_jax.training._config import load_config as load_config
from crcm_jax.training._counters import Alternation as Alternation
from crcm_jax.training._counters import Counters as Counters
from crcm_jax.training._counters import step_counts as step_counts
from crcm_jax.training._ema import ema_beta as ema_beta
from crcm_jax.training._ema import ema_exponent as ema_exponent
from crcm_jax.training._ema import ema_update as ema_update
from crcm_jax.training._evaluation import (
  evaluate_experiment as evaluate_experiment,
)
from crcm_jax.training._evaluation import samplers as samplers
from crcm_jax.training._experiment import Evaluation as Evaluation
from crcm_jax.training._experiment import Experiment as Experiment
from crcm_jax.training._experiment import read_experiment as read_experiment
from crcm_jax.training._loop import check_stage as check_stage
from crcm_jax.training._loop import Folders as Folders
from crcm_jax.training._loop import Interrupted as Interrupted
from crcm_jax.training._loop import NonFiniteUpdate as NonFiniteUpdate
from crcm_jax.training._loop import train_stage as train_stage
from crcm_jax.training._optimizer import adamw as adamw
from crcm_jax.training._processes import ending_together as ending_together
from crcm_jax.training._processes import initialize as initialize
from crcm_jax.training._processes import is_first_process as is_first_process
from crcm_jax.training._processes import START_TIMEOUT as START_TIMEOUT
from crcm_jax.training._samplers import Generator as Generator
from crcm_jax.training._samplers import Sampling as Sampling
from crcm_jax.training._stages import Loop as Loop
from crcm_jax.training._stages import read_stage as read_stage
from crcm_jax.training._stages import Stage as Stage
from crcm_jax.training._state import init_state as init_state
from crcm_jax.training._state import TrainState as TrainState
from crcm_jax.training._step import make_train_step as make_train_step
from crcm_jax.training._step import Shardings as Shardings
from crcm_jax.training._step import TrainStep as TrainStep
from crcm_jax.training._writers import Files as Files
from crcm_jax.training._writers import read_metrics as read_metrics
from crcm_jax.training._writers import TensorBoard as TensorBoard
from crcm_jax.training._writers import Writer as Writer
