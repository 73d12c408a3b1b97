"""Scores of generated clips beside held-out real ones, and the report."""

from crcm_jax.evaluation._classifier import Classifier as Classifier
from crcm_jax.evaluation._classifier import classifier_loss as classifier_loss
from crcm_jax.evaluation._classifier import FrameClassifier as FrameClassifier
from crcm_jax.evaluation._classifier import load_classifier as load_classifier
from crcm_jax.evaluation._classifier import save_classifier as save_classifier
from crcm_jax.evaluation._drift import chunk_statistics as chunk_statistics
from crcm_jax.evaluation._drift import ChunkStatistics as ChunkStatistics
from crcm_jax.evaluation._evaluate import evaluate as evaluate
from crcm_jax.evaluation._evaluate import Sampler as Sampler
from crcm_jax.evaluation._features import FeatureSpace as FeatureSpace
from crcm_jax.evaluation._features import over_time as over_time
from crcm_jax.evaluation._metrics import digit_accuracy as digit_accuracy
from crcm_jax.evaluation._metrics import diversity as diversity
from crcm_jax.evaluation._metrics import drift as drift
from crcm_jax.evaluation._metrics import frechet_distance as frechet_distance
from crcm_jax.evaluation._motion import captioned_motion as captioned_motion
from crcm_jax.evaluation._motion import motion_error as motion_error
from crcm_jax.evaluation._report import write_report as write_report
from crcm_jax.evaluation._results import METRICS as METRICS
from crcm_jax.evaluation._results import REAL as REAL
from crcm_jax.evaluation._results import Results as Results
from crcm_jax.evaluation._vbench import (
  read_vbench_results as read_vbench_results,
)
from crcm_jax.evaluation._vbench import VBENCH_DIMENSIONS as VBENCH_DIMENSIONS
from crcm_jax.evaluation._vbench import vbench_scores as vbench_scores
from crcm_jax.evaluation._vbench import VBenchScores as VBenchScores
from crcm_jax.evaluation._vbench_clips import MakeClip as MakeClip
from crcm_jax.evaluation._vbench_clips import PromptFile as PromptFile
from crcm_jax.evaluation._vbench_clips import read_rewrite as read_rewrite
from crcm_jax.evaluation._vbench_clips import (
  read_vbench_prompts as read_vbench_prompts,
)
from crcm_jax.evaluation._vbench_clips import (
  write_vbench_clips as write_vbench_clips,
)
from crcm_jax.evaluation._video import encode_video as encode_video
from crcm_jax.evaluation._video import write_video as write_video
from crcm_jax.evaluation._video_writer import video_writer as video_writer
