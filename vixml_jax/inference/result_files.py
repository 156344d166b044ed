"""Answers as JSON lines, CSV or parquet: each block a part, the parts joined at the end."""

from collections.abc import Iterable, Sequence
import csv
import io
import json
from pathlib import Path
from typing import Protocol

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
  """How answers are written."""

  def write(self, path: Path, first_row: int, queries: Sequence[Query], answers: Sequence[list[Prediction]]) -> None:
    """One part: the answers to consecutive queries, the first of which is query `first_row` of its file."""

  def join(self, parts: Iterable[Path], path: Path) -> None:
    """All parts as one file."""


def result_format(path: Path) -> ResultFormat:
  """The format of a file of answers, by the ending of its name.

  `.jsonl`: `{"row", "uid", "predictions": [{"label", "id", "text", "score"}, ...]}` a line. `.parquet`: the same as
  columns. `.csv`: a line for every prediction, with its `rank` from 1. `row` counts from 0; `uid` is the query's.

  Raises:
    InputError: another ending.
  """
  formats: dict[str, type] = {".jsonl": _JsonLines, ".csv": _Csv, ".parquet": _Parquet}
  if path.suffix not in formats:
    raise InputError(f"{path}: files of answers end in {', '.join(formats)}; name --output so")
  return formats[path.suffix]()


class _JsonLines:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], answers: Sequence[list[Prediction]]) -> None:
    with path.open("w", encoding="utf-8") as file:
      for record in _records(first_row, queries, answers):
        file.write(json.dumps(record, ensure_ascii=False) + "\n")

  def join(self, parts: Iterable[Path], path: Path) -> None:
    _concatenate(b"", parts, path)


class _Csv:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], answers: Sequence[list[Prediction]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      for row, (query, found) in enumerate(zip(queries, answers, strict=True), first_row):
        writer.writerows((row, query.uid, rank, *prediction) for rank, prediction in enumerate(found, 1))

  def join(self, parts: Iterable[Path], path: Path) -> None:
    head = io.StringIO()
    csv.writer(head, lineterminator="\n").writerow(_CSV_COLUMNS)
    _concatenate(head.getvalue().encode(), parts, path)


class _Parquet:
  def write(self, path: Path, first_row: int, queries: Sequence[Query], answers: Sequence[list[Prediction]]) -> None:
    pq.write_table(pa.Table.from_pylist(list(_records(first_row, queries, answers)), _SCHEMA), path)

  def join(self, parts: Iterable[Path], path: Path) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
      for part in parts:
        writer.write_table(pq.read_table(part, schema=_SCHEMA))


def _records(first_row: int, queries: Sequence[Query], answers: Sequence[list[Prediction]]) -> Iterable[dict]:
  for row, (query, found) in enumerate(zip(queries, answers, strict=True), first_row):
    yield {"row": row, "uid": query.uid, "predictions": [prediction._asdict() for prediction in found]}


def _concatenate(head: bytes, parts: Iterable[Path], path: Path) -> None:
  with path.open("wb") as file:
    file.write(head)
    for part in parts:
      file.write(part.read_bytes())
