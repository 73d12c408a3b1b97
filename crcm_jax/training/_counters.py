"""Who is updated when, and how many denoising steps a rollout takes.

Distribution matching trains two networks in turn: the student once in
`student_every` iterations, its critic (the fake score) in between. With
W = `warmup` and f = `student_every`, iteration i is the student's iff

  i < W  or  (i - W) mod f = 0,

and counts as the student's update number  i  (i < W),  W + floor((i - W) / f).

The number of denoising steps in a rollout cycles with these counters, so that
every step of the schedule is trained; it is data, never a recompilation.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from crcm_jax._typing import Array, Int


class Counters(NamedTuple):
  """Where the training is, as run-time arrays.

  Attributes:
    iteration: iterations (of either phase) done before this one.
    student: the student's updates before this one ("effective iteration").
    critic: the critic's updates before this one; -1 in the first iteration.
  """

  iteration: Int[Array, ""]
  student: Int[Array, ""]
  critic: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternation:
  """The order of the student's and the critic's updates.

  Attributes:
    student_every: one iteration in so many is the student's, the others are
      the critic's. 1 means that there is no critic.
    warmup: so many iterations at the start are all the student's.

  Example:
    >>> order = Alternation(student_every=3)
    >>> [order.is_student(i) for i in range(5)]
    [True, False, False, True, False]
  """

  student_every: int = 1
  warmup: int = 0

  def __post_init__(self):
    if self.student_every < 1:
      raise ValueError(
        "`student_every` must be at least 1 (1: every iteration is the "
        f"student's); got {self.student_every}."
      )
    if self.warmup < 0:
      raise ValueError(f"`warmup` must not be negative; got {self.warmup}.")

  def is_student(self, iteration: int) -> bool:
    """Returns whether an iteration updates the student, or the critic."""
    after = iteration - self.warmup
    return after < 0 or after % self.student_every == 0

  def counters(self, iteration: Any) -> Counters:
    """Returns the counters at the start of an iteration (int or int32)."""
    iteration = jnp.asarray(iteration, jnp.int32)
    after = iteration - self.warmup
    student = jnp.where(
      after < 0, iteration, self.warmup + after // self.student_every
    )
    return Counters(iteration, student, iteration - student - 1)


def step_counts(
  counter: Int[Array, ""], full_counts: Int[Array, "chunks"]
) -> Int[Array, "chunks"]:
  """Returns how many denoising steps each chunk of a rollout takes.

  With m the full counts, G = counter mod m_0 + 1 and n_b = min(G, m_b): the
  cycle 1..m_0, cut to each chunk's own schedule.

  Args:
    counter: the updates done so far by whoever is trained on the rollout.
    full_counts: the length of each chunk's schedule, largest first.
  """
  cycle = jnp.mod(counter, full_counts[0]) + 1
  return jnp.minimum(cycle, full_counts).astype(jnp.int32)
