"""Which times a model is trained at.

A `TimeDistribution` is a law on [0, 1] with its distribution function and the
inverse: `LogNormal` and `ShiftedUniform`. `monotone` draws one time per
chunk, non-decreasing over the chunks, so that a model sees histories cleaner
than what it denoises (called FoPP in FAR and CausVid-like trainers).

Sampling is split from its raw draw (`from_raw`, `monotone_from_draws`), so
that recorded draws can be replayed.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from crcm_jax import paths
from crcm_jax._typing import Array, Float, Int, PRNGKeyArray


@runtime_checkable
class TimeDistribution(Protocol):
  """A law of rectified-flow times on [0, 1]."""

  def raw(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draws the float32 variables that `from_raw` turns into times."""
    ...

  def from_raw(self, draw: Array) -> Array:
    """Turns raw draws into times."""
    ...

  def sample(self, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Draws times."""
    ...

  def cdf(self, t: Array) -> Array:
    """Returns the probability of a time below `t`."""
    ...

  def icdf(self, u: Array) -> Array:
    """Returns the time that lies above a fraction `u` of all times."""
    ...


@dataclasses.dataclass(frozen=True)
class LogNormal:
  """Times whose noise level is log-normal: `logit t ~ N(mean, std^2)`.

  With `sigma = t / (1 - t)`, this is the law of EDM: `log sigma` is normal.

  Attributes:
    mean: mean of `log sigma`; larger means noisier.
    std: standard deviation of `log sigma`, positive.

  Raises:
    ValueError: if `std` is not positive.

  References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative
    Models, https://arxiv.org/abs/2206.00364
  """

  mean: float
  std: float

  def __post_init__(self):
    if self.std <= 0:
      raise ValueError(f"`std` must be positive; got {self.std}.")

  def raw(
    self, key: PRNGKeyArray, shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Draws standard normal variables."""
    return jax.random.normal(key, shape, jnp.float32)

  def from_raw(self, draw: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turns standard normal draws z into times, `sigmoid(mean + std z)`."""
    return jax.nn.sigmoid(self.mean + self.std * draw)

  def sample(
    self, key: PRNGKeyArray, shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Draws times of a shape, float32."""
    return self.from_raw(self.raw(key, shape))

  def cdf(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `Phi((logit t - mean) / std)`."""
    z = jax.scipy.special.logit(_inside(t)) - self.mean
    return jax.scipy.special.ndtr(z / self.std)

  def icdf(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the inverse of `cdf`."""
    return self.from_raw(jax.scipy.special.ndtri(_inside(u)))


@dataclasses.dataclass(frozen=True)
class ShiftedUniform:
  """Uniform times moved towards noise, `shift u / (1 + (shift - 1) u)`.

  Attributes:
    shift: a positive factor; 1 is the uniform law, 5 is Wan's training law.

  Raises:
    ValueError: if the shift is not positive.
  """

  shift: float

  def __post_init__(self):
    if self.shift <= 0:
      raise ValueError(
        f"`shift` must be positive, 1 for uniform times; got {self.shift}."
      )

  def raw(
    self, key: PRNGKeyArray, shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Draws uniform variables."""
    return jax.random.uniform(key, shape, jnp.float32)

  def from_raw(self, draw: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Turns uniform draws into times."""
    return paths.shift_time(draw, self.shift)

  def sample(
    self, key: PRNGKeyArray, shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Draws times of a shape, float32."""
    return self.from_raw(self.raw(key, shape))

  def cdf(self, t: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `t / (shift - (shift - 1) t)`."""
    return paths.shift_time(t, 1 / self.shift)

  def icdf(self, u: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns the inverse of `cdf`."""
    return paths.shift_time(u, self.shift)


def monotone(
  key: PRNGKeyArray, distribution: TimeDistribution, batch: int, chunks: int
) -> Float[Array, "{batch} {chunks}"]:
  """Draws one time per chunk, non-decreasing over the chunks.

  A uniformly drawn anchor chunk takes a time of the distribution; the chunks
  before it split the probability below that time into exponential spacings,
  the chunks after it the probability above. The anchor alone follows the
  distribution; the mean time grows from the first chunk to the last.

  Args:
    key: a random key.
    distribution: the law of the anchor's time.
    batch: number of examples b.
    chunks: number of chunks k, see `ChunkPattern.num_chunks`.

  Returns:
    Times `[b, k]`; repeat them over frames with
    `t[:, pattern.chunk_of_frame(frames)]`.
  """
  chunk_key, time_key, left_key, right_key = jax.random.split(key, 4)
  return monotone_from_draws(
    distribution,
    jax.random.randint(chunk_key, (batch,), 0, chunks),
    distribution.sample(time_key, (batch,)),
    jax.random.exponential(left_key, (batch, chunks)),
    jax.random.exponential(right_key, (batch, chunks)),
  )


def monotone_from_draws(
  distribution: TimeDistribution,
  anchor: Int[Array, "b"],
  anchor_time: Float[Array, "b"],
  left: Float[Array, "b k"],
  right: Float[Array, "b k"],
) -> Float[Array, "b k"]:
  """Computes the times of `monotone` from its draws.

  With the anchor chunk a, its probability `u_a = cdf(anchor_time)`, and
  cumulative sums `E` and `E'` of the exponential draws (SPEC section 5):

      u_j = u_a E_j / E_a                                       for j <= a
      u_j = u_a + (1 - u_a) E'_{j-a-1} / E'_{k-1-a}             for j > a
      t_j = icdf(u_j)

  Args:
    distribution: the law of the anchor's time.
    anchor: anchor chunk of each example.
    anchor_time: its time.
    left: standard exponential draws for the chunks before the anchor.
    right: standard exponential draws for the chunks after it.

  Returns:
    Times, non-decreasing over the chunks.
  """
  chunks = left.shape[1]
  chunk, a = jnp.arange(chunks, dtype=anchor.dtype)[None], anchor[:, None]
  u = _inside(distribution.cdf(anchor_time))[:, None]
  before = _spacing(left, chunk, a)
  after = _spacing(right, jnp.clip(chunk - a - 1, 0), chunks - 1 - a)
  u_chunk = jnp.where(chunk <= a, u * before, u + (1 - u) * after)
  return distribution.icdf(u_chunk)


def _spacing(
  draws: Float[Array, "b k"], index: Int[Array, "_ k"], last: Int[Array, "b 1"]
) -> Float[Array, "b k"]:
  """Returns the cumulative sum up to `index`, as a fraction of `last`'s."""
  total = jnp.cumsum(draws, axis=1)
  index = jnp.broadcast_to(index, draws.shape)
  part = jnp.take_along_axis(total, index, axis=1)
  return jnp.minimum(part / jnp.take_along_axis(total, last, axis=1), 1)


def _inside(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """Clips to the open interval (0, 1): 2^-52 to 1 minus the dtype's epsilon.

  Near 0 every float has digits to spare, near 1 not.
  """
  return jnp.clip(p, 2.0**-52, 1 - jnp.finfo(p.dtype).eps)
