"""Formats a plain-text table of metrics for the terminal."""

from collections.abc import Mapping, Sequence

from vixml_jax.text_columns import aligned

COLUMNS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100")


def metrics_table(
  rows: Mapping[str, Mapping[str, float]],
  *,
  columns: Sequence[str] = COLUMNS,
  baselines: Mapping[str, Mapping[str, float]] | None = None,
  intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
  """Returns a table: a header, a rule, the rows, and the baselines below a second rule.

  >>> print(metrics_table({"plain": {"P@1": 48.336}}, columns=("P@1",), intervals={"plain": {"P@1": (47.0, 49.6)}}))
                 P@1
  ------------------
  plain  48.34 ±1.30

  Args:
    rows: Metrics of each row in percent, by name of the row; a missing metric is shown as "-".
    columns: Names of the metrics, in the order of the columns.
    baselines: Further rows, shown below the others.
    intervals: Bounds (low, high) of metrics, by name of the row; half the width is shown after the value.

  Returns:
    The table, without a line break at the end.
  """
  baselines, intervals = baselines or {}, intervals or {}
  cells = [
    [name, *(_cell(values, intervals.get(name, {}), column) for column in columns)]
    for part in (rows, baselines)
    for name, values in part.items()
  ]
  header, *lines = aligned([["", *columns], *cells])
  rule = "-" * len(header)
  below = [rule, *lines[len(rows) :]] if baselines else []
  return "\n".join([header, rule, *lines[: len(rows)], *below])


def _cell(values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], column: str) -> str:
  value = values.get(column)
  if value is None:
    return "-"
  if column not in intervals:
    return f"{value:.2f}"
  low, high = intervals[column]
  return f"{value:.2f} ±{(high - low) / 2:.2f}"
