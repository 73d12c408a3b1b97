"""Schedules, solvers, and generation of videos chunk by chunk."""

from crcm_jax.sampling._chunk_model import ChunkModel as ChunkModel
from crcm_jax.sampling._chunk_model import guided as guided
from crcm_jax.sampling._chunk_model import (
  MeanFlowChunkModel as MeanFlowChunkModel,
)
from crcm_jax.sampling._chunk_times import chunk_times as chunk_times
from crcm_jax.sampling._few_step import (
  consistency_sample as consistency_sample,
)
from crcm_jax.sampling._ode_pairs import ode_pairs as ode_pairs
from crcm_jax.sampling._ode_pairs import OdePairs as OdePairs
from crcm_jax.sampling._rollout import replay as replay
from crcm_jax.sampling._rollout import Rollout as Rollout
from crcm_jax.sampling._rollout import rollout as rollout
from crcm_jax.sampling._schedules import few_step_schedule as few_step_schedule
from crcm_jax.sampling._schedules import MID_TIMES as MID_TIMES
from crcm_jax.sampling._schedules import ode_schedule as ode_schedule
from crcm_jax.sampling._solvers import integrate as integrate
from crcm_jax.sampling._solvers import trajectory as trajectory
from crcm_jax.sampling._stream import Step as Step
from crcm_jax.sampling._stream import Stream as Stream
