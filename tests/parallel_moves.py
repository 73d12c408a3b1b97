"""The collectives of `parallel_steps`' steps, as sums over their passes.

A pass through a network is a `Counter` of what it moves in one layer, and of
its velocity. The mesh says which of these moves are collectives, and of which
kind. A loop's body is in the program once: that over layers, over an ODE's or a
chunk's steps, over micro-batches. All-reduces are left out: XLA joins them as
it likes.
"""

import math
from collections import Counter

import parallel_steps

FORWARD = Counter(matrices=10, swaps=4, keys=2, tokens=1)
"""One stream. A layer's matrices are query, key, value and out of two
attentions, and two of the feed-forward. q, k, v and o swap tokens for heads;
keys and values are gathered, and the velocity's patches."""

BACKWARD = Counter(matrices=10, swaps=4, key_gradients=2)
"""The matrices again, and the gradients of what was moved in the layer. Those
of the patches are whole, as the loss is."""

TWO_FORWARD = Counter(matrices=10, swaps=8, keys=4, tokens=1)
"""Clean and noisy stream: one velocity."""

TWO_BACKWARD = Counter(matrices=10, swaps=10, key_gradients=6)
"""Two outputs and queries, and keys and values thrice: the clean ones'
gradients come from their own stream and, as context, from the noisy one."""

TANGENT = Counter(swaps=4, keys=2, tokens=1)
"""Beside a forward pass, whose matrices serve: of the noisy stream alone, as
the clean one has no tangent."""

TRAIN = FORWARD + BACKWARD
TRAIN_TWO = TWO_FORWARD + TWO_BACKWARD
REPLAY = TWO_FORWARD + BACKWARD
"""The context is constant: backward there is one stream, the noisy one."""

GUIDED = FORWARD + FORWARD
GUIDED_TWO = TWO_FORWARD + TWO_FORWARD
"""A frozen teacher, with and without caption."""

# A rollout of two chunks, the first of another size, so each has a program of
# its own: the loop's step, the last step, the commit; but the last chunk's
# commit, which nobody reads, is gone.
PASSES = 5
VELOCITIES = 4  # A commit's is not read.

ROLLOUT = Counter(
  matrices=10,  # once, those of all layers
  # In each pass the chunk's keys and values; in a commit, those of all layers.
  tokens=VELOCITIES + 2 * PASSES + 2,
)

# Of two layers, each with collectives of its own; but the commit's last layer
# need not attend, as its velocity is not read. Query, key and value are one.
APART_ROLLOUT = Counter(
  matrices=2 * 8, tokens=VELOCITIES + 2 * (2 * PASSES - 1) + 2
)

LEAN_ROLLOUT = Counter(
  # Key and value of cross-attention once; a pass reads the other eight.
  matrices=2 + 8 * PASSES,
  swaps=4 * PASSES,
  keys=2 * PASSES,
  tokens=VELOCITIES,
  commits=2,
  # In each pass keys and values; but an empty cache's, which are the same
  # zeros, are one where XLA sees them: not in the loop, but in the two others.
  reads=2 * PASSES - 2,
)

CONTINUOUS = TRAIN_TWO + TANGENT + GUIDED_TWO
DISCRETE = TRAIN_TWO + GUIDED_TWO + TWO_FORWARD  # and the target
SCORES = GUIDED + FORWARD  # of real and fake


def _replicated(passes):
  """The passes of a network that is not split over fsdp."""
  return Counter({**passes, "matrices": 0})


STEPS = {
  "bidirectional_diffusion": dict(student=TRAIN),
  "teacher_forcing": dict(student=TRAIN_TWO),
  "diffusion_forcing": dict(student=TRAIN),
  "discrete_consistency": dict(student=DISCRETE),
  "continuous_consistency": dict(student=CONTINUOUS),
  "mean_flow": dict(student=CONTINUOUS),
  "ode_regression": dict(student=TRAIN_TWO + GUIDED_TWO),
  "bidirectional_ode_regression": dict(student=TRAIN + GUIDED),
  "self_forcing": dict(
    student=ROLLOUT + SCORES + REPLAY, critic=ROLLOUT + TRAIN
  ),
  "joint": dict(
    student=CONTINUOUS + ROLLOUT + SCORES + REPLAY, critic=ROLLOUT + TRAIN
  ),
  "self_forcing, lean rollouts": dict(
    student=LEAN_ROLLOUT + SCORES + REPLAY, critic=LEAN_ROLLOUT + TRAIN
  ),
  "self_forcing, layers apart": dict(
    student=APART_ROLLOUT + SCORES + REPLAY, critic=APART_ROLLOUT + TRAIN
  ),
  # Three metrics of each example, which micro-batches interleave.
  "teacher_forcing, micro-batches": dict(
    student=TRAIN_TWO + Counter(metrics=3)
  ),
  # The student is whole, but computes by columns and rows over tensor: ten
  # matrices' gradients are gathered, seven biases' and four norms'. The
  # teacher's matrices are gathered as ever.
  "discrete_consistency, rules of its own": dict(
    student=_replicated(TRAIN_TWO + TWO_FORWARD)
    + GUIDED_TWO
    + Counter(whole_gradients=10 + 7 + 4)
  ),
}
"""What each phase of a stage moves."""


def collectives(stage, phase, mesh):
  """Counts the collectives of a phase by kind, but for all-reduces."""
  data, fsdp, context, tensor = map(int, mesh.split("x"))
  # As `_Exchange` has it: neighbours swap, and groups of them gather keys.
  swap = math.gcd(context, parallel_steps.HEADS // tensor)
  apart = context // swap
  sent = {
    "all-gather": dict(
      matrices=fsdp,
      tokens=context,
      keys=apart,
      reads=apart,
      metrics=data * fsdp,
      whole_gradients=tensor,
    ),
    "all-to-all": dict(
      swaps=swap,
      # A lean cache lies by heads, or where they do not divide by patches:
      # then nothing moves as it is written, but each time that it is read.
      commits=context if apart == 1 else 1,
      reads=swap if apart > 1 else 1,
    ),
    "reduce-scatter": dict(key_gradients=apart),
  }
  moves = STEPS[stage][phase]
  counts = {
    kind: sum(moves[move] for move, among in devices.items() if among > 1)
    for kind, devices in sent.items()
  }
  return {kind: count for kind, count in counts.items() if count}
