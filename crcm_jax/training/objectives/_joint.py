"""Several objectives trained at once: their losses add up."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from crcm_jax._typing import Array, Float, Params, PRNGKeyArray
from crcm_jax.training._counters import Counters
from crcm_jax.training.objectives._objective import Objective


class JointDraws(NamedTuple):
  """The draws of each objective."""

  parts: tuple[Any, ...]


class JointMetrics(NamedTuple):
  """The metrics of each objective, and its part of the loss."""

  parts: tuple[Any, ...]
  losses: tuple[Array, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint:
  """The sum of objectives, such as consistency with distribution matching.

  Attributes:
    objectives: what to add up.
    starts: the first iteration of each; before it, it costs nothing.
  """

  objectives: tuple[Objective, ...]
  starts: tuple[int, ...]

  def __post_init__(self):
    if len(self.starts) != len(self.objectives):
      raise ValueError(
        "`starts` must hold one iteration for each of the "
        f"{len(self.objectives)} objectives; got {self.starts}."
      )

  def draws(
    self, key: PRNGKeyArray, batch: Any, counters: Counters
  ) -> JointDraws:
    """Draws for each objective."""
    keys = jax.random.split(key, len(self.objectives))
    return JointDraws(
      tuple(
        objective.draws(k, batch, counters)
        for objective, k in zip(self.objectives, keys, strict=True)
      )
    )

  def loss(
    self,
    trainable: Params,
    frozen: dict[str, Params],
    batch: Any,
    draws: JointDraws,
    counters: Counters,
  ) -> tuple[Float[Array, "b"], JointMetrics]:
    """Returns the sum of the losses of each example."""
    parts = [
      _from(start, objective, trainable, frozen, batch, drawn, counters)
      for start, objective, drawn in zip(
        self.starts, self.objectives, draws.parts, strict=True
      )
    ]
    losses, metrics = zip(*parts, strict=True)
    total = jnp.sum(jnp.stack(losses), axis=0)
    return total, JointMetrics(metrics, jax.lax.stop_gradient(losses))


def _from(start: int, objective: Objective, *arguments: Any):
  """Evaluates an objective from an iteration on; zero before."""
  if start == 0:
    return objective.loss(*arguments)
  counters = arguments[-1]
  empty = jax.tree.map(
    lambda a: jnp.zeros(a.shape, a.dtype),
    jax.eval_shape(objective.loss, *arguments),
  )
  return jax.lax.cond(
    counters.iteration >= start,
    lambda: objective.loss(*arguments),
    lambda: empty,
  )
