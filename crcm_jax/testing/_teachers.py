"""Exact diffusion models of simple data, for closed-form tests.

With data `x_0 ~ N(m, S)` and `x_t = (1 - t) x_0 + t noise`, everything a
distillation method estimates is known. Writing `C_t = (1 - t)^2 S + t^2 I` for
the covariance of x_t and `y = x_t - (1 - t) m`,

    score     grad log p_t(x_t) = -C_t^-1 y
    velocity  v = E[noise - x_0 | x_t] = (t - (1 - t) S) C_t^-1 y - m
    flow map  x_s = (1 - s) m + C_s^1/2 C_t^-1/2 y

where all matrices share the eigenvectors of S. A mixture of isotropic
Gaussians has a known velocity and score, though no known flow map.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from crcm_jax._times import expand
from crcm_jax._typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianTeacher:
  """The exact diffusion of Gaussian data.

  States are `[*times, *event]`: the mean's shape is that of one event, the
  leading axes are those of t. `velocity`, `score` and `consistency_velocity`
  are velocity-like functions of `(x_t, t)` for the losses and samplers.

  Attributes:
    mean: mean of the data, any shape.
    covariance: covariance of the flattened data, symmetric and positive
      semi-definite.

  Raises:
    ValueError: if the covariance does not fit the mean, or is no covariance.

  Example:
    >>> teacher = GaussianTeacher([1.0, -2.0], [[0.5, 0.2], [0.2, 0.3]])
    >>> teacher.velocity(jnp.zeros((1, 2)), jnp.array([1.0]))  # -mean at t = 1
    Array([[-1.,  2.]], dtype=float32)
  """

  mean: np.ndarray | list
  covariance: np.ndarray | list

  def __post_init__(self):
    mean = np.asarray(self.mean, np.float64)
    covariance = np.asarray(self.covariance, np.float64)
    if covariance.shape != (mean.size, mean.size):
      raise ValueError(
        f"`covariance` must be of shape ({mean.size}, {mean.size}) for a mean"
        f" of {mean.size} numbers; got {covariance.shape}."
      )
    if not np.allclose(covariance, covariance.T):
      raise ValueError("`covariance` must be symmetric.")
    if np.linalg.eigvalsh(covariance)[0] < -1e-9:
      raise ValueError("`covariance` must have no negative eigenvalue.")
    object.__setattr__(self, "mean", mean)
    object.__setattr__(self, "covariance", covariance)

  @functools.cached_property
  def _spectrum(self) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(self.covariance)
    return np.maximum(values, 0), vectors

  def sample(
    self, key: PRNGKeyArray, batch: int
  ) -> Float[Array, "{batch} *event"]:
    """Draws data."""
    values, vectors = self._spectrum
    draws = jax.random.normal(key, (batch, values.size))
    root = jnp.asarray(vectors * np.sqrt(values), draws.dtype)
    mean = jnp.asarray(self.mean, draws.dtype)
    return (draws @ root.T).reshape(batch, *mean.shape) + mean[None]

  def velocity(
    self, x_t: Float[Array, "*shape"], t: Float[Array, "*times"]
  ) -> Float[Array, "*shape"]:
    """Returns `E[noise - x_0 | x_t]`."""
    return self._linear(x_t, t, lambda s, t: (t - (1 - t) * s) / _c(s, t), -1.0)

  def score(
    self, x_t: Float[Array, "*shape"], t: Float[Array, "*times"]
  ) -> Float[Array, "*shape"]:
    """Returns the gradient of the log density of x_t."""
    return self._linear(x_t, t, lambda s, t: -1 / _c(s, t), 0.0)

  def flow_map(
    self,
    x_t: Float[Array, "*shape"],
    t: Float[Array, "*times"],
    s: Float[Array, "*times"],
  ) -> Float[Array, "*shape"]:
    """Returns where the ODE takes x_t from time t to time s."""
    end = expand(s, x_t)
    mean = jnp.asarray(self.mean, x_t.dtype)
    moved = self._linear(
      x_t, t, lambda v, t: jnp.sqrt(_c(v, s[..., None]) / _c(v, t)), 0.0
    )
    return moved + (1 - end) * mean.reshape((1,) * t.ndim + mean.shape)

  def consistency_function(
    self, x_t: Float[Array, "*shape"], t: Float[Array, "*times"]
  ) -> Float[Array, "*shape"]:
    """Returns the data at the end of the ODE through x_t."""
    return self.flow_map(x_t, t, jnp.zeros_like(t))

  def consistency_velocity(
    self, x_t: Float[Array, "*shape"], t: Float[Array, "*times"]
  ) -> Float[Array, "*shape"]:
    """Returns `(x_t - f(x_t, t)) / t` of the consistency function f.

    The velocity that a perfect consistency model predicts; written without
    the division, so that it is exact near t = 0.
    """

    def gain(s, t):
      root, end = jnp.sqrt(_c(s, t)), jnp.sqrt(s)
      return (t + (t - 2) * s) / ((root + end) * root)

    return self._linear(x_t, t, gain, -1.0)

  def _linear(self, x_t, t, gain, mean_factor: float) -> Array:
    """Returns `gain(S, t) y + mean_factor m` in the eigenbasis of S."""
    values, vectors = (jnp.asarray(a, x_t.dtype) for a in self._spectrum)
    mean = jnp.asarray(self.mean, x_t.dtype)
    mean = mean.reshape((1,) * t.ndim + mean.shape)
    y = (x_t - (1 - expand(t, x_t)) * mean).reshape(*t.shape, -1)
    rows = (1,) * t.ndim + values.shape
    scaled = gain(values.reshape(rows), t[..., None]) * (y @ vectors)
    return (scaled @ vectors.T).reshape(x_t.shape) + mean_factor * mean


@dataclasses.dataclass(frozen=True, eq=False)
class MixtureTeacher:
  """The exact diffusion of a mixture of isotropic Gaussians.

  Attributes:
    means: the components' means, `[components, d]`.
    stds: the components' standard deviations, `[components]`.
    weights: their probabilities, `[components]`; equal if left out.

  Raises:
    ValueError: if the shapes do not fit or the weights are no probabilities.
  """

  means: np.ndarray | list
  stds: np.ndarray | list
  weights: np.ndarray | list | None = None

  def __post_init__(self):
    means = np.asarray(self.means, np.float64)
    stds = np.asarray(self.stds, np.float64)
    equal = np.full(len(means), 1 / len(means))
    weights = np.asarray(equal if self.weights is None else self.weights)
    if means.ndim != 2 or stds.shape != (len(means),):
      raise ValueError(
        "`means` must be [components, d] and `stds` [components];"
        f" got {means.shape} and {stds.shape}."
      )
    if weights.shape != stds.shape or not np.isclose(weights.sum(), 1):
      raise ValueError(
        "`weights` must hold one probability for each component, adding up"
        f" to 1; got {weights.tolist()}."
      )
    for name, value in (("means", means), ("stds", stds), ("weights", weights)):
      object.__setattr__(self, name, value)

  def sample(self, key: PRNGKeyArray, batch: int) -> Float[Array, "{batch} d"]:
    """Draws data."""
    choose, draw = jax.random.split(key)
    means, stds, weights = self._constants(jnp.float32)
    component = jax.random.choice(choose, len(stds), (batch,), p=weights)
    noise = jax.random.normal(draw, (batch, means.shape[1]))
    return means[component] + stds[component, None] * noise

  def velocity(
    self, x_t: Float[Array, "b d"], t: Float[Array, "b"]
  ) -> Float[Array, "b d"]:
    """Returns `E[noise - x_0 | x_t]`."""
    posterior, y, c, time = self._posterior(x_t, t)
    means, stds, _ = self._constants(x_t.dtype)
    s = jnp.square(stds)[None, :, None]
    v = (time - (1 - time) * s) / c * y - means[None]
    return (posterior[..., None] * v).sum(axis=1)

  def score(
    self, x_t: Float[Array, "b d"], t: Float[Array, "b"]
  ) -> Float[Array, "b d"]:
    """Returns the gradient of the log density of x_t."""
    posterior, y, c, _ = self._posterior(x_t, t)
    return (posterior[..., None] * -y / c).sum(axis=1)

  def _constants(self, dtype) -> tuple[Array, Array, Array]:
    """Returns means, standard deviations and weights as arrays."""
    return (
      jnp.asarray(self.means, dtype),
      jnp.asarray(self.stds, dtype),
      jnp.asarray(self.weights, dtype),
    )

  def _posterior(self, x_t: Array, t: Array):
    """Returns each component's probability given x_t, and its y, C_t and t."""
    means, stds, weights = self._constants(x_t.dtype)
    time = t.astype(x_t.dtype)[:, None, None]
    y = x_t[:, None] - (1 - time) * means[None]
    c = _c(jnp.square(stds)[None, :, None], time)
    distance = jnp.square(y).sum(axis=2) / (2 * c[..., 0])
    log_density = -distance - 0.5 * x_t.shape[1] * jnp.log(c[..., 0])
    logits = jnp.log(weights)[None] + log_density
    return jax.nn.softmax(logits, axis=1), y, c, time


def _c(s: Array, t: Array) -> Array:
  """Returns the variance of x_t along a direction of data variance s."""
  return (1 - t) ** 2 * s + t**2
