"""The errors a caller of `Wan` can make, named before any shape breaks."""

from typing import Any

import jax.numpy as jnp

from crcm_jax._typing import Array
from crcm_jax.chunks import ChunkPattern
from crcm_jax.models._conditioning import Conditioning
from crcm_jax.models._config import WanConfig


def check_call(
  config: WanConfig,
  x: Array,
  t: Array,
  text: Conditioning,
  pattern: ChunkPattern | None,
  context: Array | None,
  context_t: Array | None,
) -> None:
  """Checks the arguments of `Wan.__call__`.

  Raises:
    ValueError: if shapes do not fit each other, the config or the pattern.
    TypeError: if times are narrower than float32.
  """
  _check_latents(config, x)
  _check_times("t", t, x)
  check_conditioning(config, text, x.shape[0])
  if pattern is not None:
    pattern.num_chunks(x.shape[1])  # raises if the frames do not fit
  if context is None:
    if context_t is not None:
      raise ValueError(
        "`context_t` must come with `context`, whose times they are; got"
        " `context_t` alone."
      )
    return
  if pattern is None:
    raise ValueError(
      "`context` must come with `pattern`, which says what each frame sees of"
      " it; got no pattern. Pass `pattern=ChunkPattern(first, rest)`."
    )
  if context.shape != x.shape:
    raise ValueError(
      f"`context` must have the shape of `x`, {x.shape}; got {context.shape}."
      " It holds all frames, the last chunk's are never seen."
    )
  if context_t is not None:
    _check_times("context_t", context_t, x)


def check_chunk(
  config: WanConfig, x: Array, t: Array, cache: tuple[int, ...]
) -> None:
  """Checks the arguments of `Wan.chunk`; `cache` is the shape of its keys.

  Raises:
    ValueError: if shapes do not fit each other, the config or the cache.
    TypeError: if times are narrower than float32.
  """
  _check_latents(config, x)
  _check_times("t", t, x)
  batch, frames = x.shape[:2]
  tokens = config.tokens_per_frame(*x.shape[2:4])
  if (cache[1], cache[3]) != (batch, tokens) or cache[2] < frames:
    raise ValueError(
      f"`cache` must hold batch {batch} and at least the {frames} frames of"
      f" this chunk, of {tokens} tokens each; got batch {cache[1]} and room for"
      f" {cache[2]} frames of {cache[3]} tokens. Call `init` with the batch of"
      " `x` and all frames to come."
    )


def check_end_time(config: WanConfig, end_time: Array | None, x: Array) -> None:
  """Checks the end time of a jump.

  Raises:
    ValueError: if the network has no such input, or the shape does not fit.
    TypeError: if it is narrower than float32.
  """
  if end_time is None:
    return
  if not config.end_time:
    raise ValueError(
      "`end_time` must come with a network of `WanConfig(end_time=True)`; this"
      " one has no second time. `models.add_end_time` gives it one."
    )
  _check_times("end_time", end_time, x)


def _check_latents(config: WanConfig, x: Array) -> None:
  if x.ndim != 5 or x.shape[-1] != config.in_channels:
    raise ValueError(
      "`x` must hold latents [b, f, h, w, c] with c ="
      f" {config.in_channels}; got shape {x.shape}. Move the channels last; an"
      " image-to-video network counts `Conditioning.frames` with them."
    )
  config.tokens_per_frame(*x.shape[2:4])


def _check_times(name: str, t: Array, x: Array) -> None:
  batch, frames = x.shape[:2]
  if t.shape != (batch, frames):
    raise ValueError(
      f"`{name}` must hold one time per frame, ({batch}, {frames}); got"
      f" {t.shape}. Repeat a per-example time with"
      f" `jnp.repeat({name}.reshape(-1, 1), {frames}, 1)`."
    )
  if not _wide(t.dtype):
    raise TypeError(
      f"`{name}` must be float32 or float64, a narrower time is a different"
      f" time; got {t.dtype}. Keep times in float32 beside bfloat16 latents."
    )


def _wide(dtype: Any) -> bool:
  return dtype in (jnp.dtype("float32"), jnp.dtype("float64"))


def check_conditioning(
  config: WanConfig, given: Conditioning, batch: int
) -> None:
  """Checks a prompt and an image's features.

  Raises:
    ValueError: if they do not fit the batch or the config.
  """
  check_text(config, given.text, batch)
  expected = (batch, "tokens", config.image_width)
  if config.image_width is None:
    if given.image is not None:
      raise ValueError(
        "`text.image` must be None for a text-to-video network; got features"
        f" {given.image.shape}. Load an image-to-video network."
      )
    return
  shape = None if given.image is None else given.image.shape
  if shape is None or (shape[0], shape[2]) != (batch, config.image_width):
    raise ValueError(
      f"`text.image` must hold CLIP's features {expected} for this"
      f" image-to-video network; got {shape}. Pass `text=Conditioning(text,"
      " image, frames)`."
    )


def check_text(config: WanConfig, text: Array, batch: int) -> None:
  expected = (batch, config.text_length, config.text_width)
  if text.shape != expected:
    raise ValueError(
      f"`text` must hold embeddings {expected}, [b, text_length, text_width];"
      f" got {text.shape}. Pad shorter prompts with zeros; another width"
      " belongs to another text encoder."
    )
