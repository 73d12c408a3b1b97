"""Clips of handwritten digits that move, bounce and cross on a small canvas.

The digits are real: scikit-learn's `load_digits`, 1,797 scans of 8 x 8 pixels.
A scan is drawn `DIGIT_SIZE` pixels large by cubic interpolation (Keys, 1981,
a = -1/2) at any subpixel position. Along each axis its centre goes to and fro
between `DIGIT_SIZE / 2` and `CANVAS - DIGIT_SIZE / 2` at constant speed:

  centre(i) = margin + fold(start - margin + i * velocity)
  fold(u) = room - |u mod (2 room) - room|
  margin = DIGIT_SIZE / 2,  room = CANVAS - DIGIT_SIZE

Where digits cross, the brighter ink wins. Everything about a clip follows from
(seed, split, index), and no scan serves both splits.

Canvas coordinates are (x, y) in pixels from the top left corner, x to the
right and y down; the pixel in row i and column j has its centre at
(j + 1/2, i + 1/2). Velocities are in pixels per frame.
"""

import functools
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import UInt8

from crcm_jax._extras import require
from crcm_jax._typing import Float, Int
from crcm_jax.data import _text

CANVAS = 32
"""Height and width of a clip, in pixels."""

DIGIT_SIZE = 14
"""Height and width of a digit, in pixels."""

CLIP_FRAMES = 21
"""Frames in a clip, unless asked otherwise: as many as Wan's latent frames."""

MAX_DIGITS = 2
"""Places for digits in `Labels`."""

SPEEDS = {"slowly": (0.4, 0.7), "": (1.1, 1.5), "fast": (2.0, 2.6)}
"""Range of speeds, in pixels per frame, that a caption's word stands for."""

Split: TypeAlias = Literal["train", "test"]

_SPLITS = ("train", "test")
_TEST_EVERY = 5  # every fifth scan of each digit is a test scan
_MIN_DISTANCE = 10.0  # pixels between two digits in the first frame
_FREE_FRAMES = 3  # steps before the first bounce, so that captions show
_ROOM = CANVAS - DIGIT_SIZE

_DIRECTIONS = tuple((x, y) for x in (-1, 0, 1) for y in (-1, 0, 1) if x or y)


class Labels(NamedTuple):
  """What moves in a clip and how, k = 0, 1 in the order of the caption.

  A clip with one digit has `digits[1] == scans[1] == -1` and zeros elsewhere.
  """

  digits: Int[np.ndarray, "*b k"]
  """int32: the digit shown, 0 to 9."""
  scans: Int[np.ndarray, "*b k"]
  """int32: index of its scan in `load_digits`."""
  positions: Float[np.ndarray, "*b f k 2"]
  """float32: (x, y) of its centre in each frame, canvas coordinates."""
  velocities: Float[np.ndarray, "*b f k 2"]
  """float32: (x, y) velocity in each frame, pixels per frame."""


class Clip(NamedTuple):
  """One clip, its caption and its labels."""

  video: UInt8[np.ndarray, "f h w c"]
  """Ink: 0 is the background, 255 the darkest stroke."""
  caption: str
  """What moves, and how it moves at the start; bounces turn it."""
  labels: Labels


def make_clip(
  index: int,
  *,
  split: Split = "train",
  seed: int = 0,
  frames: int = CLIP_FRAMES,
  channels: int = 1,
) -> Clip:
  """Makes clip number `index` of a split; the same arguments, the same clip.

  One or two different digits start at least 10 pixels apart, each in one of
  eight directions at one of three speeds, and go three steps before a bounce.

  Args:
    index: which clip, from 0.
    split: "train" or "test"; they share no scan.
    seed: of the whole dataset.
    frames: how many; a longer clip begins with the frames of a shorter one.
    channels: 1 for grey, 3 for a random colour per digit.

  Returns:
    The clip.

  Raises:
    ImportError: if scikit-learn, extra `data`, is missing.

  Example:
    >>> make_clip(0).video.shape
    (21, 32, 32, 1)
  """
  rng = np.random.default_rng((seed, _SPLITS.index(split), index))
  count = int(rng.integers(1, MAX_DIGITS + 1))
  digits = rng.choice(10, count, replace=False)
  scans = np.array([rng.choice(scan_pool(split)[d]) for d in digits])
  directions = rng.choice(_DIRECTIONS, count)
  words = rng.choice(tuple(SPEEDS), count)
  speeds = [rng.uniform(*SPEEDS[word]) for word in words]
  norms = np.linalg.norm(directions, axis=-1)
  velocity = directions * (np.array(speeds) / norms)[:, None]  # [k, 2]
  colours = _colours(rng, count, channels)

  positions, velocities = bounce(_starts(rng, velocity), velocity, frames)
  video = render_clip(_load_scans()[0][scans], positions, colours)
  said = (array.tolist() for array in (digits, directions, words))
  caption = _text.write_caption(list(map(_clause, *said)))
  return Clip(video, caption, _labels(digits, scans, positions, velocities))


def bounce(
  start: Float[np.ndarray, "k 2"],
  velocity: Float[np.ndarray, "k 2"],
  frames: int,
) -> tuple[Float[np.ndarray, "f k 2"], Float[np.ndarray, "f k 2"]]:
  """Moves digits at constant speed, reflected at the edges of the canvas.

  Args:
    start: (x, y) of each centre in the first frame, canvas coordinates.
    velocity: (x, y) in the first frame, pixels per frame.
    frames: how many.

  Returns:
    Positions and velocities in each frame.
  """
  margin = DIGIT_SIZE / 2
  u = start - margin + np.arange(frames)[:, None, None] * velocity
  phase = u % (2 * _ROOM) - _ROOM  # fold rises where phase < 0
  positions = margin + _ROOM - np.abs(phase)
  return positions, np.where(phase < 0, velocity, -velocity)


def render_clip(
  scans: Float[np.ndarray, "k 8 8"],
  positions: Float[np.ndarray, "f k 2"],
  colours: Float[np.ndarray, "k c"],
) -> UInt8[np.ndarray, "f h w c"]:
  """Draws scans at given positions.

  Interpolation is separable: each frame is rows @ scan @ columns^T.

  Args:
    scans: ink in [0, 1], one scan for each digit.
    positions: (x, y) of each digit's centre in each frame.
    colours: of each digit, in [0, 1]; ones for grey.

  Returns:
    The video, 0 to 255.
  """
  columns = _interpolation(positions[..., 0])  # [f, k, w, 8]
  rows = _interpolation(positions[..., 1])  # [f, k, h, 8]
  ink = np.clip(rows @ scans @ columns.swapaxes(-1, -2), 0, 1)  # [f, k, h, w]
  canvas = (ink[..., None] * colours[:, None, None]).max(axis=1)
  return np.round(255 * canvas).astype(np.uint8)


def _interpolation(centre: Float[np.ndarray, "f k"]) -> np.ndarray:
  """Weighs each scan pixel in each canvas pixel: [f, k, 32, 8]."""
  zoom = DIGIT_SIZE / 8
  pixel = np.arange(CANVAS) + 0.5
  where = (pixel - centre[..., None]) / zoom + 4  # in scan pixels
  return _keys_kernel(where[..., None] - (np.arange(8) + 0.5))


def _keys_kernel(u: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel, a = -1/2."""
  u = np.abs(u)
  near = (1.5 * u - 2.5) * u**2 + 1
  far = ((-0.5 * u + 2.5) * u - 4) * u + 2
  return np.where(u < 1, near, np.where(u < 2, far, 0.0))


def _starts(
  rng: np.random.Generator, velocity: Float[np.ndarray, "k 2"]
) -> Float[np.ndarray, "k 2"]:
  """Draws (x, y) centres that are apart and some steps from a bounce."""
  way = _FREE_FRAMES * velocity
  low = DIGIT_SIZE / 2 + np.maximum(-way, 0)
  high = CANVAS - DIGIT_SIZE / 2 - np.maximum(way, 0)
  while True:
    starts = rng.uniform(low, high)
    distance = np.linalg.norm(starts[0] - starts[-1])
    if len(starts) == 1 or distance >= _MIN_DISTANCE:
      return starts


def _colours(rng: np.random.Generator, count: int, channels: int) -> np.ndarray:
  """Draws one bright colour for each digit; grey is white: [k, c]."""
  colours = rng.uniform(0.2, 1.0, (count, 3))
  colours[np.arange(count), rng.integers(3, size=count)] = 1.0
  return colours if channels == 3 else np.ones((count, channels))


def _clause(digit: int, direction: list[int], speed: str) -> _text.Clause:
  x, y = direction
  return _text.Clause(
    digit=_text.DIGIT_WORDS[digit],
    horizontal={-1: "left", 0: "", 1: "right"}[x],
    vertical={-1: "up", 0: "", 1: "down"}[y],
    speed=speed,
  )


def _labels(
  digits: Int[np.ndarray, "k"],
  scans: Int[np.ndarray, "k"],
  positions: Float[np.ndarray, "f k 2"],
  velocities: Float[np.ndarray, "f k 2"],
) -> Labels:
  """Gives absent digits their places."""
  return Labels(
    digits=_pad(digits, -1, axis=0).astype(np.int32),
    scans=_pad(scans, -1, axis=0).astype(np.int32),
    positions=_pad(positions, 0, axis=1).astype(np.float32),
    velocities=_pad(velocities, 0, axis=1).astype(np.float32),
  )


def _pad(x: np.ndarray, value: int, *, axis: int) -> np.ndarray:
  """Fills axis `axis` up to `MAX_DIGITS`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, MAX_DIGITS - x.shape[axis])
  return np.pad(x, widths, constant_values=value)


@functools.cache
def scan_pool(split: Split) -> tuple[Int[np.ndarray, "_"], ...]:
  """Returns, for each digit 0 to 9, the indices of a split's scans.

  Args:
    split: "test" has every fifth scan of each digit, "train" the others.

  Returns:
    Ten arrays of indices into `load_digits`.
  """
  pools = []
  for digit in range(10):
    scans = np.flatnonzero(_load_scans()[1] == digit)
    is_test = np.arange(len(scans)) % _TEST_EVERY == 0
    pools.append(scans[is_test if split == "test" else ~is_test])
  return tuple(pools)


@functools.cache
def _load_scans() -> tuple[np.ndarray, np.ndarray]:
  """Returns all scans, ink in [0, 1], and their digits."""
  digits = require("sklearn.datasets", extra="data").load_digits()
  return digits.images / 16, digits.target
