"""A plain-text table of metrics for the terminal."""

from collections.abc import Mapping, Sequence

COLUMNS = ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "nDCG@5", "R@10", "R@100")


def metrics_table(
  rows: Mapping[str, Mapping[str, float]],
  *,
  columns: Sequence[str] = COLUMNS,
  baselines: Mapping[str, Mapping[str, float]] | None = None,
  intervals: Mapping[str, Mapping[str, tuple[float, float]]] | None = None,
) -> str:
  """Lines of equal width: a head, a rule, the rows, and below a second rule what they have to beat.

  Args:
    rows: for each row's name its metrics in percent; one that is missing prints as "-".
    columns: which metrics, in this order.
    baselines: rows to print below the others.
    intervals: for some rows and metrics (low, high); half their width is printed after the
      value, as in `48.34 ±1.30`.

  Returns:
    the lines, without a newline at the end.
  """
  baselines, intervals = baselines or {}, intervals or {}
  body = [
    [name, *(_cell(values, intervals.get(name, {}), column) for column in columns)]
    for part in (rows, baselines)
    for name, values in part.items()
  ]
  table = [["", *columns], *body]
  widths = [max(len(line[i]) for line in table) for i in range(len(columns) + 1)]
  lines = [_line(line, widths) for line in table]
  rule = "-" * len(lines[0])
  below = [rule, *lines[1 + len(rows) :]] if baselines else []
  return "\n".join([lines[0], rule, *lines[1 : 1 + len(rows)], *below])


def _cell(values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], column: str) -> str:
  value = values.get(column)
  if value is None:
    return "-"
  if column not in intervals:
    return f"{value:.2f}"
  low, high = intervals[column]
  return f"{value:.2f} ±{(high - low) / 2:.2f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
  first = cells[0].ljust(widths[0])
  return "  ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])
