"""Draws small charts as inline SVG: lines, bars and intervals. The style sheet of the page sets their colors."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

from markupsafe import Markup
import numpy as np

_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 14, 40
_MAX_POINTS = 400
_ROW_HEIGHT = 20


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a chart.

  Attributes:
    name: Name of the line, which a browser shows as its tooltip.
    xs: Horizontal coordinates of the points.
    ys: Vertical coordinates of the points; points whose `ys` is not finite are left out.
    style: Class in the style sheet: "first", "second" or "other".
    marks: Whether a dot is drawn at each point.
  """

  name: str
  xs: Sequence[float] | np.ndarray
  ys: Sequence[float] | np.ndarray
  style: str = "first"
  marks: bool = False


def line_chart(title: str, lines: Sequence[Line], x_label: str, marked: tuple[float, float] | None = None) -> Markup:
  """Returns a chart of lines with common axes.

  Args:
    title: Title of the chart, for screen readers.
    lines: Lines, drawn in this order. A line of more than 400 points is reduced to the minimum and the maximum of each
      of 200 sections.
    x_label: Label of the horizontal axis.
    marked: Point around which a ring is drawn; None for no ring.
  """
  thinned = [dataclasses.replace(line, xs=xs, ys=ys) for line in lines for xs, ys in [_thinned(line.xs, line.ys)]]
  plane = _Plane(_bounds([line.xs for line in thinned]), _bounds([line.ys for line in thinned], 0.05))
  return _chart(title, [plane.axes(x_label), *(_drawn(line, plane) for line in thinned), _ring(marked, plane)])


def bar_chart(
  title: str, categories: Sequence[str], bars: Mapping[str, Sequence[float | None]], x_label: str
) -> Markup:
  """Returns a chart with a group of bars for each category.

  Args:
    title: Title of the chart, for screen readers.
    categories: Names of the groups.
    bars: Values of each category, not negative, by name of the bars (at most three names); None for no bar.
    x_label: Label of the horizontal axis.
  """
  values = [value for row in bars.values() for value in row if value is not None]
  plane = _Plane((0, len(categories)), (0.0, 1.08 * max([*values, 1e-9])))
  width = 0.8 / max(len(bars), 1)
  parts = [plane.axes(x_label, x_ticks={place + 0.5: name for place, name in enumerate(categories)})]
  for number, (style, (name, row)) in enumerate(zip(("first", "second", "other"), bars.items(), strict=False)):
    for place, value in enumerate(row):
      if value is not None:
        left, top = plane.at(place + 0.1 + number * width, value)
        parts.append(
          Markup(
            '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
          ).format(
            style,
            left,
            top,
            plane.at(width, 0)[0] - plane.at(0, 0)[0] - 1,
            _HEIGHT - _BOTTOM - top,
            f"{name}, {categories[place]}: {value:.2f}",
          )
        )
  return _chart(title, parts)


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]]) -> Markup:
  """Returns a chart of values with intervals, one per row, and a vertical line at 0.

  Intervals that contain 0 are gray; the others have the color of their sign.

  Args:
    title: Title of the chart, for screen readers.
    rows: Name, value, lower bound and upper bound of each row.
  """
  height = _TOP + _BOTTOM + _ROW_HEIGHT * len(rows)
  plane = _Plane(_bounds([[0.0, *row[1:]] for row in rows], 0.05), (0, len(rows)), left=88, height=height)
  parts = [plane.axes("difference in points", y_ticks={}), plane.rule(0.0)]
  for place, (name, value, low, high) in enumerate(rows):
    x, y = plane.at(value, len(rows) - place - 0.5)
    parts.append(
      Markup(
        '<g class="{}"><title>{}</title><text class="name" x="80" y="{:.1f}">{}</text><path d="M{:.1f} {:.1f}H{:.1f}"/>'
        '<circle cx="{:.1f}" cy="{:.1f}" r="3.5"/></g>'
      ).format(
        "other" if low <= 0 <= high else "first" if value > 0 else "second",
        f"{name}: {value:+.2f} ({low:+.2f} to {high:+.2f})",
        y + 4,
        name,
        plane.at(low, 0)[0],
        y,
        plane.at(high, 0)[0],
        x,
        y,
      )
    )
  return _chart(title, parts, height)


class _Plane:
  """The coordinate system of a chart: maps values to positions in the drawing.

  Args:
    x_range: Smallest and largest horizontal value.
    y_range: Smallest and largest vertical value.
    left: Left margin in pixels.
    height: Height of the drawing in pixels.
  """

  def __init__(
    self, x_range: tuple[float, float], y_range: tuple[float, float], left: float = _LEFT, height: float = _HEIGHT
  ):
    self._x_range, self._y_range, self._left, self._height = x_range, y_range, left, height

  def at(self, x: float, y: float) -> tuple[float, float]:
    """Returns the position of a point in pixels."""
    (x_low, x_high), (y_low, y_high) = self._x_range, self._y_range
    bottom = self._height - _BOTTOM
    return (
      self._left + (x - x_low) / (x_high - x_low) * (_WIDTH - _RIGHT - self._left),
      bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP),
    )

  def axes(
    self, x_label: str, x_ticks: Mapping[float, str] | None = None, y_ticks: Mapping[float, str] | None = None
  ) -> Markup:
    """Returns grid lines, numbers and the label of the horizontal axis; ticks map values to texts."""
    x_ticks = _ticks(*self._x_range) if x_ticks is None else x_ticks
    y_ticks = _ticks(*self._y_range) if y_ticks is None else y_ticks
    bottom = self._height - _BOTTOM
    parts = [
      Markup('<text class="label" x="{:.1f}" y="{}">{}</text>').format(
        (self._left + _WIDTH - _RIGHT) / 2, self._height - 6, x_label
      )
    ]
    for value, text in y_ticks.items():
      y = self.at(0, value)[1]
      parts.append(
        Markup('<path class="grid" d="M{} {:.1f}H{}"/><text class="y" x="{}" y="{:.1f}">{}</text>').format(
          self._left, y, _WIDTH - _RIGHT, self._left - 6, y + 4, text
        )
      )
    for value, text in x_ticks.items():
      x = self.at(value, 0)[0]
      parts.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x, bottom + 16, text))
    return Markup("").join(parts)

  def rule(self, x: float) -> Markup:
    """Returns a vertical line."""
    return Markup('<path class="rule" d="M{:.1f} {}V{}"/>').format(self.at(x, 0)[0], _TOP, self._height - _BOTTOM)


def _chart(title: str, parts: Sequence[Markup], height: float = _HEIGHT) -> Markup:
  return Markup('<svg role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
    title, _WIDTH, height, Markup("").join(parts)
  )


def _drawn(line: Line, plane: _Plane) -> Markup:
  points = [plane.at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
  path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
  dots = [Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5"/>').format(*point) for point in points] if line.marks else []
  return (
    Markup('<g class="{}"><title>{}</title><path d="M{}"/>{}</g>').format(
      line.style, line.name, path, Markup("").join(dots)
    )
    if points
    else Markup("")
  )


def _ring(marked: tuple[float, float] | None, plane: _Plane) -> Markup:
  if marked is None:
    return Markup("")
  return Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="6"/>').format(*plane.at(*marked))


def _thinned(xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the finite points; of a long line, the minimum and the maximum of each section, so that spikes remain."""
  x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
  finite = np.isfinite(y)
  x, y = x[finite], y[finite]
  if len(x) <= _MAX_POINTS:
    return x, y
  sections = np.array_split(np.arange(len(x)), _MAX_POINTS // 2)
  kept = np.unique([section[extreme(y[section])] for section in sections for extreme in (np.argmin, np.argmax)])
  return x[kept], y[kept]


def _bounds(parts: Sequence[Sequence[float] | np.ndarray], margin: float = 0.0) -> tuple[float, float]:
  """Returns the minimum and the maximum of all values, widened so that they always differ."""
  values = [float(value) for part in parts for value in part]
  low, high = min(values, default=0.0), max(values, default=1.0)
  room = margin * (high - low) if high > low else max(abs(high), 1.0) / 2
  return low - room, high + room


def _ticks(low: float, high: float) -> dict[float, str]:
  """Returns three to eight round values between two bounds, with their texts."""
  raw = (high - low) / 7
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
  values = np.arange(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1) * step
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  return {float(value): f"{value + 0.0:.{decimals}f}" if decimals < 4 else f"{value:g}" for value in values}
