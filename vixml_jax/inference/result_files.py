"""Files of predictions, written a block of queries at a time and joined at the end: JSON lines, CSV and Parquet."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import io
import json
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError
from vixml_jax.inference.predictor import Prediction
from vixml_jax.inference.queries import Query

_SCHEMA = pa.schema(
  [
    ("row", pa.int64()),
    ("uid", pa.string()),
    (
      "predictions",
      pa.list_(pa.struct([("label", pa.string()), ("id", pa.int32()), ("text", pa.string()), ("score", pa.float32())])),
    ),
  ]
)
_CSV_COLUMNS = ("row", "uid", "rank", "label", "id", "text", "score")


class ResultFormat(Protocol):
  """A format of predictions."""

  def write(self, path: Path, first_row: int, queries: Sequence[Query], results: Sequence[list[Prediction]]) -> None:
    """Writes one part: the predictions for consecutive queries, which start at row `first_row` of their file."""

  def join(self, parts: Iterable[Path], path: Path) -> None:
    """Writes all parts to one file."""


def result_format(path: Path) -> ResultFormat:
  """Returns the format of a file of predictions, by the suffix of its name.

  `.jsonl` has `{"row", "uid", "predictions": [{"label", "id", "text", "score"}, ...]}` per line. `.parquet` has the
  same as columns. `.csv` has a line for every prediction, with its `rank` from 1. `row` counts queries from 0, and
  `uid` is that of the query.

  Raises:
    InputError: The suffix is unknown.
  """
  formats: dict[str, Callable[[], ResultFormat]] = {
    ".jsonl": _JsonLinesResults,
    ".csv": _CsvResults,
    ".parquet": _ParquetResults,
  }
  if path.suffix not in formats:
    raise InputError(f"{path}: files of predictions end in {', '.join(formats)}; give --output such a suffix")
  return formats[path.suffix]()


class _JsonLinesResults:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], results: Sequence[list[Prediction]]) -> None:
    with path.open("w", encoding="utf-8") as file:
      for record in _records(first_row, queries, results):
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

  def join(self, parts: Iterable[Path], path: Path) -> None:
    _concatenate(b"", parts, path)


class _CsvResults:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], results: Sequence[list[Prediction]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      for row, (query, found) in enumerate(zip(queries, results, strict=True), first_row):
        writer.writerows((row, query.uid, rank, *prediction) for rank, prediction in enumerate(found, 1))

  def join(self, parts: Iterable[Path], path: Path) -> None:
    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(_CSV_COLUMNS)
    _concatenate(header.getvalue().encode(), parts, path)


class _ParquetResults:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], results: Sequence[list[Prediction]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(_records(first_row, queries, results)), _SCHEMA), path)

  def join(self, parts: Iterable[Path], path: Path) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
      for part in parts:
        writer.write_table(pq.read_table(part, schema=_SCHEMA))


def _records(first_row: int, queries: Sequence[Query], results: Sequence[list[Prediction]]) -> Iterator[dict[str, Any]]:
  for row, (query, found) in enumerate(zip(queries, results, strict=True), first_row):
    yield {"row": row, "uid": query.uid, "predictions": [prediction._asdict() for prediction in found]}


def _concatenate(header: bytes, parts: Iterable[Path], path: Path) -> None:
  with path.open("wb") as file:
    file.write(header)
    for part in parts:
      file.write(part.read_bytes())
