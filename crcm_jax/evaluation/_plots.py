"""Line charts as inline SVG: they need no library and print sharply.

A chart shows one metric over the steps, of one run or of two on the same axes:
the points thinly, their running mean as a bold line. Colours come from the
page's style, so that charts follow its light and dark modes.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 34
_MAX_POINTS = 400
_LOG_RATIO = 30.0  # positive values that span more than this get a log axis


def line_chart(
  steps: Sequence[float], values: Sequence[float], *, name: str
) -> str:
  """Draws one metric.

  Args:
    steps: where it was measured, ascending.
    values: what was measured; values that are not finite leave a gap.
    name: what it is called, for those who cannot see the chart.

  Returns:
    An `<svg>` element.
  """
  return _chart([_finite(steps, values)], [name])


def compare_chart(
  runs: Mapping[str, tuple[Sequence[Any], Sequence[Any]]],
) -> str:
  """Draws one metric of several runs on the same axes.

  Args:
    runs: each run's name, steps and values, as `line_chart` takes them. The
      first run's line is solid, the others' have another colour and dashes.

  Returns:
    An `<svg>` element.
  """
  return _chart([_finite(*run) for run in runs.values()], list(runs))


_Points = tuple[np.ndarray, np.ndarray]


def _finite(steps: Sequence[Any], values: Sequence[Any]) -> _Points:
  x, y = np.asarray(steps, float), np.asarray(values, float)
  return x[np.isfinite(y)], y[np.isfinite(y)]


def _chart(runs: list[_Points], names: list[str]) -> str:
  x, y = (np.concatenate(arrays) for arrays in zip(*runs, strict=True))
  if len(y) == 0:
    return "<p>No finite value was logged.</p>"
  is_log = bool(y.min() > 0 and y.max() / y.min() > _LOG_RATIO)
  x_axis = _Axis(x.min(), x.max(), _LEFT, _WIDTH - _RIGHT)
  y_axis = _Axis(*_span(y, is_log), _HEIGHT - _BOTTOM, _TOP, is_log=is_log)
  lines, said = [], []
  for i, (run, name) in enumerate(zip(runs, names, strict=True)):
    if len(run[0]):
      more = " other" if i else ""
      lines += _lines(*run, x_axis, y_axis, more)
      said.append(_said(*run, name))
  parts = [
    f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
    f' aria-label="{html.escape("; ".join(said))}">',
    *_grid(x_axis, y_axis),
    *lines,
    "</svg>",
  ]
  return "".join(parts)


def _lines(
  x: np.ndarray, y: np.ndarray, x_axis: "_Axis", y_axis: "_Axis", more: str
) -> list[str]:
  """Draws the points thinly and their running mean."""
  keep = np.unique(np.linspace(0, len(x) - 1, _MAX_POINTS).astype(int))
  smooth = _smooth(y)
  return [
    _polyline(f"raw{more}", x_axis(x[keep]), y_axis(y[keep])),
    _polyline(f"mean{more}", x_axis(x[keep]), y_axis(smooth[keep])),
  ]


def _said(x: np.ndarray, y: np.ndarray, name: str) -> str:
  smooth = _smooth(y)
  return (
    f"{name}: {_number(smooth[0])} at step {x[0]:.0f},"
    f" {_number(smooth[-1])} at step {x[-1]:.0f}"
  )


def _smooth(y: np.ndarray) -> np.ndarray:
  return _running_mean(y, window=max(1, len(y) // 30))


class _Axis:
  """Maps values to pixels, and knows where its ticks are."""

  def __init__(
    self,
    low: float,
    high: float,
    start: int,
    stop: int,
    *,
    is_log: bool = False,
  ):
    self.is_log = is_log
    self._low, self._high = low, high
    self._start, self._stop = start, stop

  def __call__(self, value: Any) -> Any:
    low, high = self._scale(self._low), self._scale(self._high)
    share = (self._scale(value) - low) / ((high - low) or 1.0)
    return self._start + share * (self._stop - self._start)

  def ticks(self) -> list[float]:
    if self.is_log:
      first = math.ceil(math.log10(self._low) - 1e-9)
      last = math.floor(math.log10(self._high) + 1e-9)
      return [10.0**e for e in range(first, last + 1)]
    step = _nice((self._high - self._low) / 4)
    first = math.ceil(self._low / step - 1e-9)
    last = math.floor(self._high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]

  def _scale(self, value):
    return np.log10(value) if self.is_log else value


def _span(y: np.ndarray, is_log: bool) -> tuple[float, float]:
  """Returns the ends of the vertical axis, a little beyond the values."""
  low, high = float(y.min()), float(y.max())
  if is_log:
    return low / 1.2, high * 1.2
  margin = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
  return low - margin, high + margin


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
  """Draws grid lines and their numbers."""
  parts = []
  for tick in y_axis.ticks():
    y = float(y_axis(tick))
    parts.append(
      f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}"'
      f' y1="{y:.1f}" y2="{y:.1f}"/>'
      f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
      f"{_number(tick)}</text>"
    )
  for tick in x_axis.ticks():
    x = float(x_axis(tick))
    parts.append(
      f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">'
      f"{_number(tick)}</text>"
    )
  middle = (_LEFT + _WIDTH - _RIGHT) / 2
  parts.append(
    f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">step</text>'
  )
  return parts


def _polyline(style: str, x: np.ndarray, y: np.ndarray) -> str:
  points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
  return f'<polyline class="{style}" points="{points}"/>'


def _running_mean(y: np.ndarray, *, window: int) -> np.ndarray:
  """Averages the last `window` values, fewer at the start."""
  total = np.concatenate([[0.0], np.cumsum(y)])
  stop = np.arange(1, len(y) + 1)
  start = np.maximum(stop - window, 0)
  return (total[stop] - total[start]) / (stop - start)


def _nice(step: float) -> float:
  """Rounds up to 1, 2 or 5 times a power of ten."""
  if step <= 0:
    return 1.0
  power = 10.0 ** math.floor(math.log10(step))
  return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _number(value: float) -> str:
  return f"{value:.4g}"
