"""The data of charts: points, colors, long lines, and values that JSON lacks."""

from html.parser import HTMLParser
import json

import numpy as np
import pytest

from vixml_jax.report.charts import Line, bar_chart, interval_chart, line_chart, map_chart


def content_of(chart):
  """Returns the data of a chart as a browser reads them."""
  found = []
  parser = HTMLParser()
  parser.handle_starttag = lambda _, attributes: found.append(dict(attributes))
  parser.feed(str(chart))
  assert found[0]["role"] == "img" and found[0]["aria-label"]
  return json.loads(found[0]["data-chart"])


def test_a_line_keeps_its_points_and_a_long_one_its_spikes():
  chart = content_of(line_chart("t", [Line("l", [0, 5, 10], [1.0, 3.0, 2.0], "second", True)], "step", (5, 3.0)))
  assert chart["lines"] == [{"name": "l", "style": "second", "marks": True, "points": [[0, 1], [5, 3], [10, 2]]}]
  assert (chart["x"], chart["marked"]) == ("step", [5, 3.0])
  values = np.ones(100_000)
  values[54_321], values[70_000] = 9.0, np.nan
  (line,) = content_of(line_chart("t", [Line("l", range(100_000), values)], "step"))["lines"]
  assert len(line["points"]) <= 400 and [54_321.0, 9.0] in line["points"]


@pytest.mark.parametrize("values", [[0.0], [], [float("nan")], [float("inf"), 1.0]])
def test_values_that_are_not_finite_are_left_out(values):
  (line,) = content_of(line_chart("t", [Line("l", range(len(values)), values)], "step"))["lines"]
  assert [y for _, y in line["points"]] == [value for value in values if np.isfinite(value)]


def test_bars_have_their_names_and_intervals_the_color_of_their_sign():
  bars = content_of(bar_chart("t", ["a", "b"], {"plain": [10.0, None], "augmented": [20.0, 5.0]}, "x"))
  assert bars["bars"] == [
    {"name": "plain", "style": "first", "values": [10.0, None]},
    {"name": "augmented", "style": "second", "values": [20.0, 5.0]},
  ]
  rows = [("up", 2.0, 1.0, 3.0), ("down", -2.0, -3.0, -1.0), ("level", 0.5, -1.0, 2.0)]
  intervals = content_of(interval_chart("t", rows))["rows"]
  assert [(row["name"], row["style"]) for row in intervals] == [("up", "first"), ("down", "second"), ("level", "other")]


def test_a_map_has_a_point_for_each_label():
  chart = map_chart("t", "name", np.array([[0.12345, 1.0], [2.0, 3.0]], np.float32), [7, 1], ['a "b" <c>', "d"])
  assert content_of(chart)["points"] == [[0.123, 1.0, 7, 'a "b" <c>'], [2.0, 3.0, 1, "d"]]
