"""Floating-point operations that a train step cannot do without.

Counted are matrix products and the products of attention over visible (query,
key) pairs, an operation each for a multiplication and its addition. Not
counted are what is done element by element, and whatever is done twice: no
recomputation for a backward pass, no replay of a rollout. (A run's own
utilisation, `crcm_jax.training.flops.step`, counts in the traced program, where
a replay is not known as one; otherwise the two agree, as a test shows.)

With s tokens of width m in a stream, hidden width w of the feed-forward
layers, l layers, n heads of width d and L text tokens:

    linear layers, forward     2 s l (6 m^2 + 2 m w)    q k v o, q o of cross-
                                                        attention, up and down
    attention, one product     2 n d l pairs
    attention, forward         2 products: q k^T, p v

The tangent of linear layers is a forward; of attention it takes 4 products a
pair where queries, keys and values move, 2 where only queries do. The backward
pass of linear layers is two forwards (inputs and weights); that of attention 4
products: do v^T, p^T do, ds k, ds^T q, of which 2 if keys and values are
constants.
"""

import dataclasses

from crcm_jax import kernels, models
from crcm_jax.chunks import ChunkPattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
  """What is counted for: one example.

  Attributes:
    config: sizes of the network.
    frames: latent frames.
    tokens: tokens of a frame.
    pattern: how frames form chunks.
  """

  config: models.WanConfig
  frames: int
  tokens: int
  pattern: ChunkPattern

  # --- One forward pass of one stream, by part ---

  @property
  def linear(self) -> float:
    """Layers and head of one stream, and its times' embedding."""
    c = self.config
    size = c.patch[1] * c.patch[2]
    token = c.layers * (6 * c.width**2 + 2 * c.width * c.ffn_width)
    token += size * (c.in_channels + c.out_channels) * c.width
    frame = c.width * (c.freq_width + c.width + 6 * c.width)
    return 2.0 * self.frames * (self.tokens * token + frame)

  @property
  def text(self) -> float:
    """The prompt's embedding, and its keys and values in every layer."""
    c = self.config
    token = c.width * (c.text_width + c.width) + 2 * c.layers * c.width**2
    return 2.0 * c.text_length * token

  def products(self, pairs: float) -> float:
    """One attention product over some pairs, in all heads and layers."""
    return 2.0 * self.config.layers * self.config.width * pairs

  @property
  def cross(self) -> float:
    """Attention of one stream to the prompt."""
    seen = self.frames * self.tokens * self.config.text_length
    return self.products(2 * seen)

  @property
  def pairs(self) -> tuple[float, float]:
    """Visible pairs of the noisy stream: with the past, with its own chunk."""
    edges = self.pattern.token_boundaries(self.frames, self.tokens)
    rows = kernels.BlockMask.noisy_rows(edges)
    past, own = rows.visible_pairs([edges[-1], edges[-1]])
    return past, own

  # --- Passes ---

  @property
  def stream(self) -> float:
    """One causal stream that attends to its past and to its own chunk.

    The clean stream of teacher forcing, the noisy one, and the chunks of a
    rollout after each other are all of this size.
    """
    return self.linear + self.cross + self.products(2 * sum(self.pairs))

  @property
  def teacher_forcing(self) -> float:
    """Both streams, forward."""
    return 2 * self.stream + self.text

  @property
  def bidirectional(self) -> float:
    """One stream in which every frame sees every frame, forward."""
    whole = (self.frames * self.tokens) ** 2
    return self.linear + self.cross + self.text + self.products(2 * whole)

  @property
  def tangent(self) -> float:
    """The noisy stream's tangent beside its output; the clean one is still."""
    past, own = self.pairs
    return self.linear + self.cross + self.products(2 * past + 4 * own)

  @property
  def last_steps_backward(self) -> float:
    """Gradient of a rollout's last steps, whose past is constant."""
    past, own = self.pairs
    products = self.products(2 * past + 4 * own)
    return 2 * (self.linear + self.cross + self.text) + products


def tf_scm(video: Video, *, guided: bool) -> float:
  """Consistency in continuous time, from one pass for value and tangent."""
  teacher = (1 + guided) * video.teacher_forcing
  return teacher + 3 * video.teacher_forcing + video.tangent


def tf_dcm(video: Video, *, guided: bool, skip: int = 1) -> float:
  """Consistency in discrete time: student, its target, teacher steps."""
  teacher = (1 + guided) * skip * video.teacher_forcing
  return teacher + 4 * video.teacher_forcing


def rollout(video: Video, *, steps: int) -> float:
  """`steps` denoising steps of every chunk, and a pass that commits it."""
  return (steps + 1) * video.stream + video.text


def sf_dmd(video: Video, *, steps: int, guided: bool) -> float:
  """The student's step: rollout, three scores, gradient of the last steps."""
  scores = (1 + guided + 1) * video.bidirectional
  return rollout(video, steps=steps) + scores + video.last_steps_backward


def critic(video: Video, *, steps: int) -> float:
  """The critic's step: rollout, flow matching of a bidirectional network."""
  return rollout(video, steps=steps) + 3 * video.bidirectional
