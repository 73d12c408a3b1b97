"""Videos of prompts by Wan's networks: from a folder of weights to files."""

from crcm_jax.generation._clips import Clip as Clip
from crcm_jax.generation._clips import FPS as FPS
from crcm_jax.generation._clips import is_finished as is_finished
from crcm_jax.generation._clips import read_prompts as read_prompts
from crcm_jax.generation._clips import Timing as Timing
from crcm_jax.generation._clips import write_clip as write_clip
from crcm_jax.generation._generator import decode_to_bytes as decode_to_bytes
from crcm_jax.generation._generator import Generator as Generator
from crcm_jax.generation._image import load_image as load_image
from crcm_jax.generation._networks import load_networks as load_networks
from crcm_jax.generation._networks import Networks as Networks
from crcm_jax.generation._networks import RANDOM as RANDOM
from crcm_jax.generation._networks import random_networks as random_networks
from crcm_jax.generation._networks import random_params as random_params
from crcm_jax.generation._settings import Settings as Settings
from crcm_jax.generation._speed import measure_speed as measure_speed
from crcm_jax.generation._speed import Speed as Speed
from crcm_jax.generation._speed import warm_up as warm_up
from crcm_jax.generation._trained import check_trained as check_trained
from crcm_jax.generation._trained import trained_pattern as trained_pattern
