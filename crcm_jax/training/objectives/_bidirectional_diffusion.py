"""Diffusion training of the bidirectional teacher.

x_t = (1 - t) x_0 + t noise,  loss = w(t) || v(x_t, t) - (noise - x_0) ||^2
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax

from crcm_jax import losses
from crcm_jax._typing import Array, Bool, Float, Params, PRNGKeyArray
from crcm_jax.time_sampling import ShiftedUniform, TimeDistribution
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives import _inputs, _networks

DEFAULT_TIME = ShiftedUniform(5.0)

Weighting = Literal["none", "gaussian_bell"]
"""Weight of a time in a diffusion loss."""


class DiffusionDraws(NamedTuple):
  """One time a video, noise, and whose caption is dropped."""

  t: Float[Array, "b"]
  noise: Float[Array, "b f h w c"]
  drop: Bool[Array, "b"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BidirectionalDiffusion:
  """Flow matching of a network in which every frame sees every frame.

  Attributes:
    student: the network.
    time: law of the training times.
    weighting: weight of a time.
    caption_dropout: share of examples that are trained without caption.
    loss_scale: factor of the loss.
  """

  student: Any
  time: TimeDistribution = DEFAULT_TIME
  weighting: Weighting = "gaussian_bell"
  caption_dropout: float = 0.1
  loss_scale: float = 100.0

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> DiffusionDraws:
    """Draws times, noise and dropped captions."""
    del counters
    time_key, noise_key, drop_key = jax.random.split(key, 3)
    size = batch.x_0.shape[0]
    return DiffusionDraws(
      t=self.time.sample(time_key, (size,)),
      noise=_inputs.noise_like(noise_key, batch.x_0),
      drop=jax.random.bernoulli(drop_key, self.caption_dropout, (size,)),
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: DiffusionDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], losses.FlowMatchingMetrics]:
    """Returns the flow-matching loss of each example."""
    del frozen, counters
    inputs = _inputs.prepare(batch, draws.drop)
    t = _inputs.per_frame(draws.t, inputs.x_0)
    loss, metrics = losses.flow_matching_loss(
      _networks.bidirectional(self.student, inputs.condition),
      trainable,
      inputs.x_0,
      draws.noise,
      t,
      weight=time_weight(self.weighting, t),
    )
    return self.loss_scale * loss, metrics


def time_weight(
  weighting: Weighting, t: Float[Array, "b f"]
) -> Float[Array, "b f"] | None:
  """Returns the weight of each time; None for no weighting.

  Raises:
    ValueError: for an unknown weighting.
  """
  if weighting == "none":
    return None
  if weighting == "gaussian_bell":
    return losses.gaussian_bell_weight(t)
  raise ValueError(
    f'`weighting` must be "none" or "gaussian_bell"; got {weighting!r}.'
  )
