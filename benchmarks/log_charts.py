"""Draws panels of lines with logarithmic axes as one SVG file, readable on light and on dark pages."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from xml.sax.saxutils import escape

_WIDTH, _PLOT_HEIGHT, _LEGEND_ROW = 380, 190, 17
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 18, 34, 44
_MOST_TICKS = 6
# Lines differ in color and in dashes.
_STYLE = """
  text { font-family: Helvetica, Arial, sans-serif; font-size: 12px; fill: #1f2328 }
  .title { font-size: 13px; font-weight: bold }
  .page { fill: #ffffff; stroke: #d0d7de }
  .grid { stroke: #d0d7de }
  .line { fill: none; stroke-width: 2 }
  .c0 { stroke: #0969da } .c1 { stroke: #bc4c00; stroke-dasharray: 7 4 } .c2 { stroke: #1a7f37; stroke-dasharray: 2 3 }
  .d0 { fill: #0969da } .d1 { fill: #bc4c00 } .d2 { fill: #1a7f37 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .page { fill: #0d1117; stroke: #30363d }
    .grid { stroke: #30363d }
    .c0 { stroke: #58a6ff } .c1 { stroke: #f0883e } .c2 { stroke: #3fb950 }
    .d0 { fill: #58a6ff } .d1 { fill: #f0883e } .d2 { fill: #3fb950 }
  }
"""


@dataclasses.dataclass(frozen=True)
class Panel:
  """Lines with common axes.

  Attributes:
    title: What the vertical axis shows, with its unit.
    x_label: What the horizontal axis shows.
    lines: Points of at most three lines by their names. Points that are not positive are left out.
  """

  title: str
  x_label: str
  lines: Mapping[str, Sequence[tuple[float, float]]]


def log_chart(title: str, panels: Sequence[Panel]) -> str:
  """Returns an SVG document with panels side by side.

  Args:
    title: Title for screen readers, which a browser shows as a tooltip.
    panels: The panels, from the left; each has at least one point.
  """
  most = max(len(panel.lines) for panel in panels)
  top = _TOP + most * _LEGEND_ROW
  width, height = _WIDTH * len(panels), top + _PLOT_HEIGHT + _BOTTOM
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    'role="img">',
    f"<title>{escape(title)}</title>",
    f"<style>{_STYLE}</style>",
    f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
  ]
  for number, panel in enumerate(panels):
    parts += [f'<g transform="translate({number * _WIDTH} 0)">', *_drawn(panel, top), "</g>"]
  return "\n".join([*parts, "</svg>"]) + "\n"


def _drawn(panel: Panel, top: int) -> list[str]:
  """Returns the elements of a panel whose plot begins at `top`."""
  lines = {name: [(x, y) for x, y in points if x > 0 and y > 0] for name, points in panel.lines.items()}
  xs = sorted({x for points in lines.values() for x, _ in points})
  ticks = round_values(*(pick(y for points in lines.values() for _, y in points) for pick in (min, max)))
  bottom = top + _PLOT_HEIGHT

  def across(x: float) -> float:
    room = _WIDTH - _LEFT - _RIGHT
    return _LEFT + 0.06 * room + 0.88 * room * _share(x, xs[0], xs[-1])

  def up(y: float) -> float:
    return bottom - _PLOT_HEIGHT * _share(y, ticks[0], ticks[-1])

  parts = [f'<text class="title" x="{_LEFT}" y="22">{escape(panel.title)}</text>']
  for y in _thinned(ticks):
    parts.append(f'<path class="grid" d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}"/>')
    parts.append(f'<text x="{_LEFT - 6}" y="{up(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
  for x in xs:
    parts.append(f'<path class="grid" d="M{across(x):.1f} {top}V{bottom}"/>')
    parts.append(f'<text x="{across(x):.1f}" y="{bottom + 16}" text-anchor="middle">{short(x)}</text>')
  middle = (_LEFT + _WIDTH - _RIGHT) / 2
  parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(panel.x_label)}</text>')
  for number, (name, points) in enumerate(lines.items()):
    legend = _TOP + number * _LEGEND_ROW
    parts.append(f'<path class="line c{number}" d="M{_LEFT} {legend}h28"/>')
    parts.append(f'<text x="{_LEFT + 36}" y="{legend + 4}">{escape(name)}</text>')
    places = [(across(x), up(y)) for x, y in points]
    if places:
      path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
      parts.append(f'<path class="line c{number}" d="M{path}"/>')
    for (x, y), (left, height) in zip(points, places, strict=True):
      tooltip = f"<title>{escape(name)}, {short(x)}: {y:.4g}</title>"
      parts.append(f'<circle class="d{number}" cx="{left:.1f}" cy="{height:.1f}" r="3.5">{tooltip}</circle>')
  return parts


def _share(value: float, low: float, high: float) -> float:
  """Returns the place of a value between two others, 0 to 1, on a logarithmic axis."""
  return math.log(value / low) / math.log(high / low) if high > low else 0.5


def round_values(low: float, high: float) -> list[float]:
  """Returns the values 1, 2 and 5 times a power of ten from one that is at most `low` to one that is at least `high`.

  >>> round_values(0.3, 4.0)
  [0.2, 0.5, 1.0, 2.0, 5.0]
  >>> round_values(5.0, 5.0)
  [2.0, 5.0, 10.0]
  """
  powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
  values = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
  first = max(number for number, value in enumerate(values) if value <= low)
  last = min(number for number, value in enumerate(values) if value >= high)
  return values[first - (first == last) : last + 1 + (first == last)]


def _thinned(ticks: Sequence[float]) -> Sequence[float]:
  """Returns the ticks, or only the powers of ten if they are many."""
  if len(ticks) <= _MOST_TICKS:
    return ticks
  return [tick for tick in ticks if f"{tick:e}".startswith("1.000000e")]


def short(value: float) -> str:
  """Returns a number as a text of few characters.

  >>> [short(value) for value in (10_000_000, 100_000, 2048, 0.001, 5e-06)]
  ['10M', '100K', '2048', '0.001', '5e-06']
  """
  for unit, letter in ((1_000_000, "M"), (1000, "K")):
    if value >= unit and value % unit == 0:
      return f"{value / unit:g}{letter}"
  return f"{value:g}"
