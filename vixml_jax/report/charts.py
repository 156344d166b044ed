"""Describes charts as JSON, which `static/charts.js` draws with Apache ECharts in the reader's browser."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from markupsafe import Markup
import numpy as np

_MAX_POINTS = 400
_STYLES = ("first", "second", "other")
_HEIGHT, _ROW_HEIGHT, _MAP_HEIGHT = 250, 22, 560


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a chart.

  Attributes:
    name: Name of the line, which a browser shows as its tooltip.
    xs: Horizontal coordinates of the points.
    ys: Vertical coordinates of the points; points whose `ys` is not finite are left out.
    style: Color: "first", "second" or "other".
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
  drawn = [
    {"name": line.name, "style": line.style, "marks": line.marks, "points": _thinned(line.xs, line.ys)}
    for line in lines
  ]
  return _chart(title, {"kind": "lines", "x": x_label, "lines": drawn, "marked": marked})


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
  drawn = [
    {"name": name, "style": style, "values": list(row)}
    for style, (name, row) in zip(_STYLES, bars.items(), strict=False)
  ]
  return _chart(title, {"kind": "bars", "x": x_label, "categories": list(categories), "bars": drawn})


def interval_chart(title: str, rows: Sequence[tuple[str, float, float, float]]) -> Markup:
  """Returns a chart of values with intervals, one per row, and a vertical line at 0.

  Intervals that contain 0 are gray; the others have the color of their sign.

  Args:
    title: Title of the chart, for screen readers.
    rows: Name, value, lower bound and upper bound of each row.
  """
  drawn = [
    {
      "name": name,
      "value": value,
      "low": low,
      "high": high,
      "style": "other" if low <= 0 <= high else "first" if value > 0 else "second",
    }
    for name, value, low, high in rows
  ]
  height = 50 + _ROW_HEIGHT * max(len(rows), 2)
  return _chart(title, {"kind": "intervals", "x": "difference in points", "rows": drawn}, height)


def map_chart(title: str, name: str, points: np.ndarray, sizes: Sequence[int], texts: Sequence[str]) -> Markup:
  """Returns a map of named points, which a text field with `data-searches` equal to `name` searches.

  Args:
    title: Title of the chart, for screen readers.
    name: Id of the element.
    points: Positions [P, 2].
    sizes: Number of training queries of each point, which sets its size.
    texts: Name of each point.
  """
  drawn = [
    [round(float(x), 3), round(float(y), 3), int(size), text]
    for (x, y), size, text in zip(points, sizes, texts, strict=True)
  ]
  return _chart(title, {"kind": "map", "points": drawn}, _MAP_HEIGHT, name)


def _chart(title: str, content: dict[str, Any], height: int = _HEIGHT, name: str | None = None) -> Markup:
  return Markup('<div class="chart"{} role="img" aria-label="{}" style="height:{}px" data-chart="{}"></div>').format(
    Markup(' id="{}"').format(name) if name else "", title, height, json.dumps(content, allow_nan=False)
  )


def _thinned(xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> list[list[float]]:
  """Returns the finite points; of a long line, the minimum and the maximum of each section, so that spikes remain."""
  x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
  finite = np.isfinite(y)
  x, y = x[finite], y[finite]
  if len(x) > _MAX_POINTS:
    sections = np.array_split(np.arange(len(x)), _MAX_POINTS // 2)
    kept = np.unique([section[extreme(y[section])] for section in sections for extreme in (np.argmin, np.argmax)])
    x, y = x[kept], y[kept]
  return np.stack([x, y], axis=1).tolist()
