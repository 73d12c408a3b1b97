"""A small multi-label classifier: which digits does a canvas frame show?

It plays the part that an Inception network plays for photographs: its hidden
layer describes what a frame looks like, its output what is on it. It is small
enough to be trained in a few CPU minutes and to ship with the repository.
"""

import dataclasses
import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from crcm_jax import models
from crcm_jax._typing import Array, Bool, Float, Params

NUM_DIGITS = 10


class FrameOutputs(NamedTuple):
  """What the classifier says about each frame.

  Attributes:
    features: the activations before the last layer.
    probabilities: how likely each of the ten digits is visible.
  """

  features: Float[np.ndarray, "b f d"]
  probabilities: Float[np.ndarray, "b f digits"]


class FrameClassifier(nn.Module):
  """Four convolutions, the mean and maximum over positions, two layers.

  Attributes:
    widths: channels of the convolutions, each halving the resolution.
    num_features: width of the hidden layer whose activations are the features.
  """

  widths: tuple[int, ...] = (16, 32, 64)
  num_features: int = 64

  @nn.compact
  def __call__(
    self, frames: Float[Array, "n h w"]
  ) -> tuple[Float[Array, "n d"], Float[Array, "n digits"]]:
    """Returns features and logits of grey frames in [-1, 1]."""
    x = frames[..., None]
    for i, width in enumerate(self.widths):
      x = nn.Conv(width, (3, 3), strides=2, name=f"conv_{i}")(x)
      x = nn.gelu(x)
    x = nn.gelu(nn.Conv(self.widths[-1], (3, 3), name="conv_last")(x))
    pooled = jnp.concatenate([x.mean(axis=(1, 2)), x.max(axis=(1, 2))], axis=-1)
    features = nn.gelu(nn.Dense(self.num_features, name="features")(pooled))
    return features, nn.Dense(NUM_DIGITS, name="digits")(features)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """A trained `FrameClassifier`, called on whole videos.

  Attributes:
    params: its parameters.
    network: the module.
  """

  params: Params
  network: FrameClassifier = dataclasses.field(default_factory=FrameClassifier)

  def __call__(self, video: Float[np.ndarray, "b f h w"]) -> FrameOutputs:
    """Classifies every frame of a batch of grey clips in [-1, 1].

    Args:
      video: the clips on the canvas.

    Returns:
      Features and probabilities of each frame.
    """
    b, f, h, w = video.shape
    frames = jnp.asarray(video, jnp.float32).reshape(b * f, h, w)
    features, logits = _apply(self.network, self.params, frames)
    return FrameOutputs(
      np.asarray(features).reshape(b, f, -1),
      np.asarray(jax.nn.sigmoid(logits)).reshape(b, f, -1),
    )


def save_classifier(
  path: str | os.PathLike[str], classifier: Classifier
) -> None:
  """Writes a classifier in bfloat16.

  Args:
    path: the file, `*.safetensors`.
    classifier: what to write.
  """
  network = classifier.network
  metadata = {
    "widths": list(network.widths),
    "num_features": network.num_features,
  }
  models.save_params(path, classifier.params, metadata, dtype=jnp.bfloat16)


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
  """Reads what `save_classifier` wrote.

  Args:
    path: the file.

  Returns:
    The classifier; it computes in float32.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if the file is damaged or holds something else.
  """
  params, metadata = models.load_params(path, dtype=jnp.float32)
  if "num_features" not in metadata:
    raise ValueError(
      f"`path` must hold a frame classifier; {os.fspath(path)!r} holds other"
      " parameters. Take the file that"
      " `experiments.moving_digits.train_classifier` wrote."
    )
  network = FrameClassifier(tuple(metadata["widths"]), metadata["num_features"])
  return Classifier(params, network)


def classifier_loss(
  network: FrameClassifier,
  params: Params,
  frames: Float[Array, "n h w"],
  visible: Bool[Array, "n digits"],
) -> Float[Array, ""]:
  """Returns the mean binary cross-entropy over frames and digits.

  Args:
    network: the module.
    params: its parameters.
    frames: grey frames in [-1, 1].
    visible: which digits each frame shows.

  Returns:
    The loss; zero when every digit is predicted with certainty.
  """
  outputs: Any = network.apply({"params": params}, frames)
  _, logits = outputs
  # log(1 + exp(logit)) - visible * logit, the cross-entropy of a sigmoid
  return jnp.mean(jax.nn.softplus(logits) - visible * logits)


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: FrameClassifier, params: Params, frames: Array):
  return network.apply({"params": params}, frames)
