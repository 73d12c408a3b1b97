"""Schedules, solvers, and generation of videos chunk by chunk."""

from crcm_jax.sampling._chunk_model import ChunkModel as ChunkModel
from crcm_jax.sampling._chunk_model import guided as guided
from crcm_jax.sampling._chunk_times import chunk_times as chunk_times
from crcm_jax.sampling._rollout import replay as replay
from crcm_jax.sampling._rollout import Rollout as Rollout
from crcm_jax.sampling._rollout import rollout as rollout
