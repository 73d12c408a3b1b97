"""Moving digits, and latents prepared from videos: captions and batches.

Importing this package needs none of the extra `data`; preparing and reading
the datasets do. For other data, write an iterator of `Batch`: docs/data.md.
"""

from crcm_jax.data._batch import Batch as Batch
from crcm_jax.data._batch import BatchIterator as BatchIterator
from crcm_jax.data._clips import bounce as bounce
from crcm_jax.data._clips import CANVAS as CANVAS
from crcm_jax.data._clips import Clip as Clip
from crcm_jax.data._clips import CLIP_FRAMES as CLIP_FRAMES
from crcm_jax.data._clips import DIGIT_SIZE as DIGIT_SIZE
from crcm_jax.data._clips import Labels as Labels
from crcm_jax.data._clips import make_clip as make_clip
from crcm_jax.data._clips import MAX_DIGITS as MAX_DIGITS
from crcm_jax.data._clips import render_clip as render_clip
from crcm_jax.data._clips import scan_pool as scan_pool
from crcm_jax.data._clips import SPEEDS as SPEEDS
from crcm_jax.data._latents import latents_from_video as latents_from_video
from crcm_jax.data._latents import video_from_latents as video_from_latents
from crcm_jax.data._pipeline import (
  labelled_moving_digits as labelled_moving_digits,
)
from crcm_jax.data._pipeline import LabelledBatch as LabelledBatch
from crcm_jax.data._pipeline import (
  moving_digits_batches as moving_digits_batches,
)
from crcm_jax.data._pipeline import (
  prepare_moving_digits as prepare_moving_digits,
)
from crcm_jax.data._reading import Batches as Batches
from crcm_jax.data._reading import Reading as Reading
from crcm_jax.data._records import BadRecord as BadRecord
from crcm_jax.data._records import LatentExample as LatentExample
from crcm_jax.data._shards import read_embedding as read_embedding
from crcm_jax.data._shards import read_latent_shards as read_latent_shards
from crcm_jax.data._text import Clause as Clause
from crcm_jax.data._text import DIGIT_WORDS as DIGIT_WORDS
from crcm_jax.data._text import encode_captions as encode_captions
from crcm_jax.data._text import NULL_CAPTION as NULL_CAPTION
from crcm_jax.data._text import read_caption as read_caption
from crcm_jax.data._text import TEXT_ENCODER_VERSION as TEXT_ENCODER_VERSION
from crcm_jax.data._text import TEXT_LENGTH as TEXT_LENGTH
from crcm_jax.data._text import TEXT_WIDTH as TEXT_WIDTH
from crcm_jax.data._text import write_caption as write_caption
from crcm_jax.data._videos import encode_videos as encode_videos
from crcm_jax.data._videos import find_videos as find_videos
from crcm_jax.data._videos import read_video as read_video
from crcm_jax.data._videos import VideoFile as VideoFile
from crcm_jax.data._wan_pipeline import (
  check_wan_latents_name as check_wan_latents_name,
)
from crcm_jax.data._wan_pipeline import (
  describe_wan_latents as describe_wan_latents,
)
from crcm_jax.data._wan_pipeline import (
  prepare_wan_latents as prepare_wan_latents,
)
from crcm_jax.data._wan_pipeline import (
  wan_latents_batches as wan_latents_batches,
)
from crcm_jax.data._wan_pipeline import WanLatentsInfo as WanLatentsInfo
