"""Charts: positions to scale, ranges of all kinds, colors."""

import re

import numpy as np
import pytest

from vixml_jax.report.charts import Line, bar_chart, interval_chart, line_chart


def _points(path):
  return np.array([[float(number) for number in point.split()] for point in path[1:].split("L")])


def test_a_line_is_drawn_to_scale_and_keeps_its_spikes():
  chart = str(line_chart("t", [Line("l", [0, 5, 10], [1.0, 3.0, 2.0])], "step"))
  points = _points(re.search(r'<title>l</title><path d="([^"]*)"', chart)[1])
  x, y = points.T
  assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)
  assert (y[0] - y[1]) / (y[2] - y[1]) == pytest.approx(2, abs=0.01), "larger values are higher, to scale"
  assert x.min() > 0 and x.max() < 440 and y.min() > 0 and y.max() < 250
  values = np.ones(100_000)
  values[54_321], values[70_000] = 9.0, np.nan
  spiky = str(line_chart("t", [Line("l", range(100_000), values)], "step"))
  assert len(spiky) < 20_000
  heights = _points(re.search(r'<title>l</title><path d="([^"]*)"', spiky)[1])[:, 1]
  assert (heights < heights.max() - 100).sum() == 1


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-7, 2e-7], [-5e6, 5e6], [], [float("nan")]])
def test_any_range_of_values_gives_a_chart_with_distinct_numbers_at_its_axes(values):
  chart = str(line_chart("t", [Line("l", range(len(values)), values)], "step"))
  for axis in "xy":
    ticks = re.findall(rf'<text class="{axis}"[^>]*>([^<]*)<', chart)
    assert 2 <= len(ticks) <= 9 and len(set(ticks)) == len(ticks), ticks
  assert "nan" not in chart and "inf" not in chart


def test_bars_are_to_scale_and_intervals_are_colored_by_sign():
  bars = str(bar_chart("t", ["a", "b"], {"plain": [10.0, None], "augmented": [20.0, 5.0]}, "x"))
  heights = [float(height) for height in re.findall(r'height="([\d.]+)"', bars)]
  assert heights == pytest.approx([heights[1] / 2, heights[1], heights[1] / 4], abs=0.2)
  intervals = str(interval_chart("t", [("up", 2.0, 1.0, 3.0), ("down", -2.0, -3.0, -1.0), ("level", 0.5, -1.0, 2.0)]))
  assert re.findall(r'<g class="(\w+)"><title>(\w+)', intervals) == [
    ("first", "up"),
    ("second", "down"),
    ("other", "level"),
  ]
