"""Tracks digits on a black canvas and compares their motion with a caption.

Ink is what is brighter than the background. With one digit its track is the
ink's centre of mass. With two, each frame's ink is explained by two round
blobs of fixed width (expectation-maximisation, started where constant velocity
leads from the previous frame), which follows most digits through a crossing.
The error that this leaves on real clips is the floor of the motion error.

Positions are (x, y) in pixels, x to the right and y down, velocities in pixels
per frame, as in `crcm_jax.data`.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

from crcm_jax import data

NOMINAL_SPEED = {word: sum(ends) / 2 for word, ends in data.SPEEDS.items()}
"""Pixels per frame that a caption's word stands for: the mean of its range."""

_INK_THRESHOLD = 0.25  # of the range from black to white: ignores faint noise
_BLOB_STD = 4.0  # pixels: best follows real digits through crossings
_EM_STEPS = 4
_WALL_MARGIN = 3.0  # pixels within which a digit may already turn, or not yet
_TINY = 1e-6


def captioned_motion(
  captions: Sequence[str],
) -> tuple[Bool[np.ndarray, "b digits"], Float[np.ndarray, "b k 2"]]:
  """Reads from captions what a clip must show.

  Args:
    captions: of moving digits; see `data.read_caption`.

  Returns:
    Which of the ten digits are named, and the (x, y) velocity of each of the
    k = 2 places for digits at the start of the clip; NaN where a caption names
    only one digit.
  """
  digits = np.zeros((len(captions), len(data.DIGIT_WORDS)), bool)
  velocity = np.full((len(captions), data.MAX_DIGITS, 2), np.nan)
  for i, caption in enumerate(captions):
    for k, clause in enumerate(data.read_caption(caption)):
      digits[i, data.DIGIT_WORDS.index(clause.digit)] = True
      x = {"left": -1, "": 0, "right": 1}[clause.horizontal]
      y = {"up": -1, "": 0, "down": 1}[clause.vertical]
      speed = NOMINAL_SPEED[clause.speed] / max(np.hypot(x, y), 1)
      velocity[i, k] = speed * x, speed * y
  return digits, velocity


def motion_error(
  video: Float[np.ndarray, "b f h w"], captioned: Float[np.ndarray, "b k 2"]
) -> Float[np.ndarray, "b"]:
  """Returns how far each clip's motion is from its caption's, pixels per frame.

  The mean over steps of `|tracked velocity - captioned velocity|`, and over
  digits, assigned to the caption's clauses in the order that fits best. A digit
  keeps the captioned velocity from the first frame on; only near a wall may it
  turn away from that wall, since a caption tells the motion at the start. A
  frozen digit scores the captioned speed.

  Args:
    video: grey clips in [-1, 1].
    captioned: (x, y) velocities at the start; NaN for a digit that is absent.

  Returns:
    The error of each clip; NaN if its caption names no digit.
  """
  count = np.isfinite(captioned).all(axis=-1).sum(axis=-1)
  error = np.full(len(video), np.nan)
  for k in range(1, captioned.shape[1] + 1):
    some = count == k
    if some.any():
      tracks = track(ink(video[some]), k)
      error[some] = _best_assignment(tracks, captioned[some, :k])
  return error


def ink(video: Float[np.ndarray, "b f h w"]) -> Float[np.ndarray, "b f h w"]:
  """Returns how much brighter than the background each pixel is.

  Args:
    video: grey clips in [-1, 1]; black is background.

  Returns:
    Non-negative weights.
  """
  brightness = (np.nan_to_num(video.astype(np.float64)) + 1) / 2
  return np.clip(brightness - _INK_THRESHOLD, 0.0, 1.0)


def track(
  weights: Float[np.ndarray, "b f h w"], count: int
) -> Float[np.ndarray, "b f k 2"]:
  """Follows `count` digits; mid-canvas where there is no ink.

  Args:
    weights: the ink of each pixel.
    count: how many digits each clip shows, 1 or 2.

  Returns:
    Positions in each frame.
  """
  b, f, h, w = weights.shape
  y, x = np.mgrid[:h, :w] + 0.5
  pixels = np.stack([x, y], axis=-1).reshape(h * w, 2)
  weights = weights.reshape(b, f, h * w)
  if count == 1:
    return _centre(weights, pixels)[:, :, None]
  centres = [_split(weights[:, 0], pixels)]
  velocity = np.zeros_like(centres[0])
  for i in range(f):
    centres.append(_fit_blobs(weights[:, i], pixels, centres[-1] + velocity))
    velocity = centres[-1] - centres[-2] if i else velocity
  return np.stack(centres[1:], axis=1)


def _centre(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
  """Returns the centre of mass, [..., 2]; the canvas' middle without ink."""
  middle = pixels.mean(axis=0)
  total = weights.sum(axis=-1, keepdims=True) + _TINY
  return middle + weights @ (pixels - middle) / total


def _split(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
  """Starts two centres along the longest axis of the ink: [b, 2, 2]."""
  centre = _centre(weights, pixels)
  offset = pixels - centre[:, None]  # [b, p, 2]
  covariance = np.einsum("bp,bpi,bpj->bij", weights, offset, offset)
  covariance /= weights.sum(axis=-1)[:, None, None] + _TINY
  variance, axes = np.linalg.eigh(covariance)
  step = np.sqrt(variance[:, -1:]) * axes[:, :, -1]
  return np.stack([centre - step, centre + step], axis=1)


def _fit_blobs(
  weights: np.ndarray, pixels: np.ndarray, centres: np.ndarray
) -> np.ndarray:
  """Moves centres [b, 2, 2] to those of two round blobs that share the ink."""
  for _ in range(_EM_STEPS):
    square = ((pixels - centres[:, :, None]) ** 2).sum(axis=-1)  # [b, 2, p]
    margin = (square[:, 0] - square[:, 1]) / (2 * _BLOB_STD**2)
    second = 1 / (1 + np.exp(-np.clip(margin, -50, 50)))
    share = weights[:, None] * np.stack([1 - second, second], axis=1)
    moved = share @ pixels / (share.sum(axis=-1, keepdims=True) + _TINY)
    found = share.sum(axis=-1, keepdims=True) > _TINY
    centres = np.where(found, moved, centres)
  return centres


def _best_assignment(tracks: np.ndarray, captioned: np.ndarray) -> np.ndarray:
  """Returns the smallest mean error over orders of the tracks: [b]."""
  orders = itertools.permutations(range(tracks.shape[2]))
  errors = [_path_error(tracks[:, :, order], captioned) for order in orders]
  return np.min([error.mean(axis=(1, 2)) for error in errors], axis=0)


def _path_error(tracks: np.ndarray, captioned: np.ndarray) -> np.ndarray:
  """Returns |tracked - expected velocity| of each step and digit, [b f-1 k].

  The expected velocity is the captioned one, of which a component changes sign
  where the track turns away from a wall that is near.
  """
  low = data.DIGIT_SIZE / 2 + _WALL_MARGIN
  high = data.CANVAS - low
  expected, errors = captioned, []
  for here, there in itertools.pairwise(np.moveaxis(tracks, 1, 0)):
    away = np.where(here < low, 1, np.where(here > high, -1, np.sign(expected)))
    turned = away * np.abs(expected)
    moved = there - here
    turns = np.abs(moved - turned) < np.abs(moved - expected)
    expected = np.where(turns, turned, expected)
    errors.append(np.linalg.norm(moved - expected, axis=-1))
  return np.stack(errors, axis=1)
