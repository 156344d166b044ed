"""Aligns the columns of plain-text tables."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  """Returns a line for each row, in which every column has one width.

  The first column is left-aligned, the others are right-aligned, and two spaces separate the columns.

  >>> aligned([["", "P@1"], ["plain", "48.34"], ["augmented", "7.00"]])
  ['             P@1', 'plain      48.34', 'augmented   7.00']

  Args:
    rows: Cells of each row, the same number in every row.
  """
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.rjust(width) if place else cell.ljust(width)
      for place, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
