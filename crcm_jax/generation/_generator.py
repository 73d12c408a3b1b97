"""From a prompt's embeddings to frames, which come as they are made.

While the host waits for the frames of a chunk, the device works on the next
one. Latent frames are decoded one at a time, whatever the chunks: the decoder
is compiled for a clip's first latent frame and for all others.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from crcm_jax import guidance, models, sampling
from crcm_jax._typing import Array, Float, Params, Velocity
from crcm_jax.generation._networks import Networks
from crcm_jax.generation._settings import Settings

Text = Float[np.ndarray, "b l d"] | Float[Array, "b l d"]
Image = Float[np.ndarray, "rows columns 3"]
Frames = np.ndarray
"""uint8 [t, h, w, 3]: one frame of a clip's start, then four at a time."""


class Generator:
  """Generates clips of one size in one way; compiled once for all of them.

  Example:
    >>> networks = random_networks("tiny")  # doctest: +SKIP
    >>> settings = Settings(frames=9, height=32, width=32,
    ...                     pattern=ChunkPattern(1, 1))  # doctest: +SKIP
    >>> generate = Generator(networks, settings)  # doctest: +SKIP
    >>> text = networks.embed(["a cat"])  # doctest: +SKIP
    >>> frames = np.concatenate(list(generate(text)))  # doctest: +SKIP
  """

  def __init__(self, networks: Networks, settings: Settings):
    """Checks that networks and settings fit each other.

    Args:
      networks: of `load_networks` or `random_networks`.
      settings: what to make of them.

    Raises:
      ValueError: if the size does not fit the networks, or they need an image
        that they cannot be given.
    """
    self.networks, self.settings = networks, settings
    config = networks.transformer.config
    self.shape = settings.latent_shape(networks.vae.config, config)
    if config.image_width is not None:
      raise ValueError(
        "`networks` must be text-to-video; this image-to-video network reads"
        " CLIP's features of the image, which are not computed here. Animate"
        " an image with a causal network whose first chunk is one latent frame,"
        " or call `models.Wan` with a `Conditioning`."
      )
    _, height, width, _ = self.shape
    assert settings.guidance is not None  # filled
    self.stream = sampling.Stream(
      model=_Chunks(networks.transformer, height, width, settings.guidance),
      solver="euler" if settings.solver == "euler" else "consistency",
      context="clean" if settings.noisy_context is None else "last_step",
      context_start=settings.noisy_context or 0,
      initial_scale=settings.schedules[0][0],
    )

  def __call__(
    self,
    text: Text,
    null: Text | None = None,
    *,
    seed: int = 0,
    image: Image | None = None,
  ) -> Iterator[Frames]:
    """Returns the frames of a clip, a latent frame's at a time.

    Args:
      text: embeddings of the prompt, `[1, l, d]`.
      null: of the negative prompt; needed where there is guidance.
      seed: of the noise.
      image: the first frame, in [-1, 1]; its chunk is that frame alone.

    Raises:
      ValueError: if `null` is missing, or the chunks cannot take an image.
    """
    return self.decode(self.latents(text, null, seed=seed, image=image))

  def latents(
    self,
    text: Text,
    null: Text | None = None,
    *,
    seed: int = 0,
    image: Image | None = None,
  ) -> Iterator[Float[Array, "b n h w c"]]:
    """Returns the latents of a clip, a chunk at a time; see `__call__`."""
    settings, params = self.settings, self.networks.params
    if settings.guidance == 1:
      null = None
    elif null is None:
      raise ValueError(
        "`null` must hold embeddings of the negative prompt, there is guidance"
        f" of scale {settings.guidance}; got None. The usual one is empty."
      )
    conditioning = jax.tree.map(jnp.asarray, (text, null))
    prefix = None if image is None else self._encode(image)
    draw, draw_prefix = jax.random.split(jax.random.key(seed))
    frames, *rest = self.shape
    frames -= 0 if prefix is None else 1
    steps = max(map(len, settings.schedules)) - 1
    steps = steps if settings.solver == "few_step" else 1
    noise = jax.random.normal(draw, (steps, 1, frames, *rest))
    if settings.pattern is None:
      whole = _whole(
        self.networks.transformer, settings, params, noise[0], conditioning
      )
      return iter((whole,))
    return self.stream(
      params,
      conditioning,
      noise,
      settings.pattern,
      settings.schedules,
      prefix=prefix,
      prefix_noise=jax.random.normal(draw_prefix, (1, 1, *rest)),
    )

  def decode(
    self, chunks: Iterator[Float[Array, "b n h w c"]]
  ) -> Iterator[Frames]:
    """Decodes chunks of latents as they come; the first of a batch alone."""
    vae, params = self.networks.vae, self.networks.vae_params
    cache, waiting = None, []
    for number, chunk in enumerate(chunks):
      made = []
      for i in range(chunk.shape[1]):
        latent = _pick(chunk, np.int32(i))
        pixels, cache = decode_to_bytes(vae, params, latent, cache)
        pixels.copy_to_host_async()
        made.append(pixels)
      if number == 0:  # somebody waits for it
        yield from map(np.asarray, made)
        continue
      # The device has this chunk to do; the one before is, or soon will be.
      yield from map(np.asarray, waiting)
      waiting = made
    yield from map(np.asarray, waiting)

  def _encode(self, image: Image) -> Float[Array, "1 1 h w c"]:
    pattern = self.settings.pattern
    if pattern is None or pattern.first != 1 or self.shape[0] < 2:
      raise ValueError(
        "`image` must be all of the first chunk, one latent frame; got the"
        f" pattern {pattern} and {self.shape[0]} latent frames. Use a causal"
        " network trained with such chunks, `--pattern 1,N`."
      )
    size = (self.settings.height, self.settings.width, 3)
    if image.shape != size:
      raise ValueError(
        f"`image` must have the shape of a frame, {size}; got {image.shape}."
        " `load_image` fits a picture to it."
      )
    vae, params = self.networks.vae, self.networks.vae_params
    return models.encode_video(vae, params, jnp.asarray(image)[None, None])


@dataclasses.dataclass(frozen=True)
class _Chunks:
  """Makes the chunk model of a prompt and a negative one.

  Equal ones share compiled programs.
  """

  transformer: models.Wan
  height: int
  width: int
  scale: float

  def __call__(
    self, conditioning: tuple[Array, Array | None]
  ) -> sampling.ChunkModel:
    text, null = conditioning
    under = functools.partial(
      models.WanChunks,
      self.transformer,
      height=self.height,
      width=self.width,
    )
    if null is None:
      return under(text)
    return sampling.guided(under(text), under(null), self.scale)


@jax.jit
def _pick(chunk: Float[Array, "b n h w c"], i: Array) -> Array:
  return lax.dynamic_slice_in_dim(chunk[:1], i, 1, axis=1)


@functools.partial(jax.jit, static_argnames="vae")
def decode_to_bytes(
  vae: models.Vae,
  params: Params,
  latent: Float[Array, "1 1 h w c"],
  cache: models.VaeCache | None,
) -> tuple[Array, models.VaeCache]:
  """Decodes the next latent frame of a clip to uint8 `[t, h, w, 3]`."""
  pixels, cache = models.decode_chunk(vae, params, latent, cache)
  pixels = jnp.nan_to_num(pixels[0].astype(jnp.float32))
  return jnp.round((pixels + 1) * 127.5).astype(jnp.uint8), cache


@functools.partial(jax.jit, static_argnames=("model", "settings"))
def _whole(
  model: models.Wan,
  settings: Settings,
  params: Params,
  noise: Float[Array, "b f h w c"],
  conditioning: tuple[Array, Array | None],
) -> Float[Array, "b f h w c"]:
  """Follows the ODE of a bidirectional network."""

  def under(text: Array) -> Velocity:
    def velocity(x: Array, t: Array) -> Any:
      t = jnp.repeat(t[:, None], x.shape[1], axis=1)
      return model.apply({"params": params}, x, t, text)

    return velocity

  text, null = conditioning
  velocity = under(text)
  if null is not None:
    assert settings.guidance is not None  # filled
    velocity = guidance.classifier_free(
      velocity, under(null), settings.guidance
    )
  times = np.asarray(settings.schedules[0])
  solver = "unipc" if settings.solver == "unipc" else "euler"
  return sampling.integrate(velocity, times[0] * noise, times, solver=solver)
