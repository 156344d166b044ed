"""Counts and reads the queries or labels of a split, whichever format its files have."""

from collections.abc import Iterator
from typing import Any

from vixml_jax.datasets import raw_records, raw_text
from vixml_jax.datasets.raw import FoundFiles
from vixml_jax.datasets.raw_records import DataWarnings
from vixml_jax.errors import InputError


def count_rows(files: FoundFiles) -> int:
  """Returns the number of rows of a split.

  Raises:
    InputError: The file is empty or cannot be read.
  """
  rows = (raw_text if files.is_text else raw_records).count_rows(files.rows)
  if not rows:
    what = "a line 'uid->title'" if files.is_text else "one JSON object"
    raise InputError(f"{files.rows}: the file is empty; it must have {what} per row")
  return rows


def read_rows(
  files: FoundFiles, split: str, counts: dict[str, int], data_warnings: DataWarnings
) -> Iterator[dict[str, Any]]:
  """Yields the rows of a split: see `raw_records.read_queries` and `raw_records.read_labels`.

  Args:
    files: Files of the split.
    split: `train`, `test` or `labels`.
    counts: Number of rows of each split.
    data_warnings: Counts unusual values.

  Raises:
    InputError: A row cannot be used. The message names the file and the line.
  """
  if split == "labels":
    return (raw_text if files.is_text else raw_records).read_labels(files.rows, data_warnings)
  if files.targets:
    return raw_text.read_queries(files.rows, files.targets, counts[split], counts["labels"], data_warnings)
  return raw_records.read_queries(files.rows, counts["labels"], data_warnings)
