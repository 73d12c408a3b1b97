"""Video through a `Vae` in little memory: piece by piece, tile by tile.

The first piece of a clip is one frame and one latent, each later one four
frames and one latent. Large frames can be cut into overlapping tiles, which
are blended with weights that fall towards the tiles' edges:

  y = sum_i w_i y_i / sum_i w_i.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import einops
import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._typing import Array, Float, Params
from crcm_jax.models._config import at_least_float32
from crcm_jax.models._vae import Vae
from crcm_jax.models._vae_layers import Output, Video

VaeCache: TypeAlias = Any
"""What the layers remember of a clip's earlier pieces, a pytree of arrays; its
size depends on the size of a frame, not on the number of frames."""

# The cache is not donated: new frames would be written where old ones are yet
# to be read, and XLA would copy the whole of it first.
_chunk_jit = functools.partial(jax.jit, static_argnames="vae")
_clip_jit = functools.partial(
  jax.jit, static_argnames=("vae", "tile", "overlap")
)


@_chunk_jit
def encode_chunk(
  vae: Vae,
  params: Params,
  video: Float[Array, "b t h w 3"],
  cache: VaeCache | None = None,
) -> tuple[Output, VaeCache]:
  """Encodes the next frames of a clip.

  Args:
    vae: the network.
    params: its parameters.
    video: pixels in [-1, 1]: 4k + 1 frames that start a clip, or 4k more.
    cache: what the frames before left behind, None at the start.

  Returns:
    Latents, normalised, and the cache for the frames that follow.

  Raises:
    ValueError: if frames or pixels do not fill whole latents.
  """
  frames, *size = video.shape[1:4]
  step = vae.config.time_factor
  vae.config.latent_shape(frames + (cache is not None), *size)
  if cache is not None and frames < step:
    raise ValueError(
      f"`video` must go on with whole latents, {step}k frames; got {frames}."
    )
  return _apply(vae, params, "encode", video, cache)


@_chunk_jit
def decode_chunk(
  vae: Vae, params: Params, latents: Video, cache: VaeCache | None = None
) -> tuple[Output, VaeCache]:
  """Decodes the next latent frames of a clip.

  Args:
    vae: the network.
    params: its parameters.
    latents: any number of latent frames, normalised.
    cache: what the latents before left behind, None at the start.

  Returns:
    Pixels in [-1, 1], four frames a latent frame (one for a clip's first), and
    the cache for the latents that follow.

  Raises:
    ValueError: if the latents have another number of channels.
  """
  _check_latents(vae, latents)
  return _apply(vae, params, "decode", latents, cache)


@_clip_jit
def encode_video(
  vae: Vae,
  params: Params,
  video: Float[Array, "b t h w 3"],
  *,
  tile: tuple[int, int] | None = None,
  overlap: int = 8,
) -> Output:
  """Encodes a clip; its pixels and latents aside, memory is constant in time.

  Args:
    vae: the network.
    params: its parameters.
    video: pixels in [-1, 1], 4k + 1 frames.
    tile: rows and columns of a tile, in latents; None takes frames whole.
    overlap: rows and columns, in latents, that neighbouring tiles share.

  Returns:
    The posterior's mean, normalised.

  Raises:
    ValueError: if frames or pixels do not fill whole latents, or tiles do not
      overlap by less than their size.
  """
  vae.config.latent_shape(*video.shape[1:4])
  step = functools.partial(_apply, vae, params, "encode")
  run = functools.partial(_in_pieces, step, length=vae.config.time_factor)
  return _in_tiles(run, video, tile, overlap, vae.config.space_factor, 1)


@_clip_jit
def decode_video(
  vae: Vae,
  params: Params,
  latents: Video,
  *,
  tile: tuple[int, int] | None = None,
  overlap: int = 8,
) -> Output:
  """Decodes a clip; its pixels and latents aside, memory is constant in time.

  Args:
    vae: the network.
    params: its parameters.
    latents: normalised latents.
    tile: rows and columns of a tile, in latents; None takes frames whole.
    overlap: rows and columns, in latents, that neighbouring tiles share.

  Returns:
    Pixels in [-1, 1].

  Raises:
    ValueError: if the latents have another number of channels, or tiles do not
      overlap by less than their size.
  """
  _check_latents(vae, latents)
  step = functools.partial(_apply, vae, params, "decode")
  run = functools.partial(_in_pieces, step, length=1)
  return _in_tiles(run, latents, tile, overlap, 1, vae.config.space_factor)


def _apply(
  vae: Vae, params: Params, method: str, x: Array, cache: VaeCache | None
) -> tuple[Array, VaeCache]:
  variables = {"params": params}
  if cache is not None:
    variables["cache"] = cache
  y, kept = vae.apply(variables, x, method=method, mutable=["cache"])
  return y, kept["cache"]


def _check_latents(vae: Vae, latents: Array) -> None:
  channels = vae.config.channels
  if latents.ndim != 5 or latents.shape[-1] != channels:
    raise ValueError(
      f"`latents` must be [b, f, h, w, c] with c = {channels}; got shape"
      f" {latents.shape}. Move the channels last."
    )


def _in_pieces(step: Callable[..., Any], x: Video, *, length: int) -> Output:
  """Runs the first frame, then pieces of `length` frames, one after another."""
  first, cache = step(x[:, :1], None)
  if x.shape[1] == 1:
    return first
  pieces = einops.rearrange(x[:, 1:], "b (k s) h w c -> k b s h w c", s=length)
  body = lambda cache, piece: step(piece, cache)[::-1]
  later = jax.lax.scan(body, cache, pieces)[1]
  later = einops.rearrange(later, "k b s h w c -> b (k s) h w c")
  return jnp.concatenate([first, later], axis=1)


def _in_tiles(
  run: Callable[[Array], Array],
  x: Video,
  tile: tuple[int, int] | None,
  overlap: int,
  unit_in: int,
  unit_out: int,
) -> Output:
  """Blends what `run` makes of tiles; a latent is `unit` pixels wide."""
  size = (x.shape[2] // unit_in, x.shape[3] // unit_in)
  if tile is None or (size[0] <= tile[0] and size[1] <= tile[1]):
    return run(x)
  if not 0 <= overlap < min(tile):
    raise ValueError(
      f"`overlap` must be at least 0 and less than `tile`, {tile}; got"
      f" {overlap}."
    )
  tile = (min(size[0], tile[0]), min(size[1], tile[1]))
  corners = _corners(size, tile, overlap)
  weight = _weight(tile, overlap, unit_out)
  total = np.zeros((size[0] * unit_out, size[1] * unit_out))
  for row, column in corners * unit_out:
    total[row:, column:][: weight.shape[0], : weight.shape[1]] += weight
  shape = (*x.shape[:2], tile[0] * unit_in, tile[1] * unit_in, x.shape[4])

  def make(corner: Array) -> Array:
    return run(jax.lax.dynamic_slice(x, _at(corner, unit_in), shape))

  def add(blended: Array, corner: Array) -> tuple[Array, None]:
    y = make(corner).astype(blended.dtype) * _over_pixels(weight, blended)
    place = _at(corner, unit_out)
    y = y + jax.lax.dynamic_slice(blended, place, y.shape)
    return jax.lax.dynamic_update_slice(blended, y, place), None

  y = jax.eval_shape(make, jnp.asarray(corners[0]))
  blended = jnp.zeros(
    (*y.shape[:2], *total.shape, y.shape[4]), at_least_float32(y.dtype)
  )
  blended, _ = jax.lax.scan(add, blended, jnp.asarray(corners))
  return (blended / _over_pixels(total, blended)).astype(y.dtype)


def _at(corner: Array, unit: int) -> list[Any]:
  """Where a tile starts, for a slice of a video."""
  return [0, 0, corner[0] * unit, corner[1] * unit, 0]


def _over_pixels(a: np.ndarray, like: Array) -> Array:
  return jnp.asarray(a, like.dtype)[None, None, :, :, None]


def _corners(
  size: tuple[int, int], tile: tuple[int, int], overlap: int
) -> np.ndarray:
  """Where tiles start; the last ones end at the far edges."""

  def along(size: int, tile: int) -> list[int]:
    return [*range(0, size - tile, tile - overlap), size - tile]

  rows, columns = along(size[0], tile[0]), along(size[1], tile[1])
  return np.array([(r, c) for r in rows for c in columns], np.int32)


def _weight(tile: tuple[int, int], overlap: int, unit: int) -> np.ndarray:
  """Weights of a tile's pixels: 1, falling linearly over the overlap."""

  def along(n: int) -> np.ndarray:
    edge = np.arange(n * unit) + 0.5
    edge = np.minimum(edge, edge[::-1])
    return np.minimum(1.0, edge / max(overlap * unit, 1))

  return np.outer(along(tile[0]), along(tile[1]))
