"""Files of predictions, written a block of queries at a time and joined at the end: JSON lines, CSV and Parquet."""

from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import io
import itertools
import json
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError
from vixml_jax.inference.predictions import PredictionColumns
from vixml_jax.ragged import offsets_of

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

  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
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
  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    # Most of an object depends on the label only.
    starts = [
      f'{{"label": {encode(uid)}, "id": {label}, "text": {encode(text)}, "score": ' for uid, label, text in found.labels
    ]
    objects = [
      f"{starts[place]}{score!r}}}" for place, score in zip(found.places.tolist(), found.scores.tolist(), strict=True)
    ]
    with path.open("w", encoding="utf-8") as file:
      for row, uid, first, stop in _bounds(first_row, uids, found):
        predictions = ", ".join(objects[first:stop])
        file.write(f'{{"row": {row}, "uid": {encode(uid)}, "predictions": [{predictions}]}}\n')

  def join(self, parts: Iterable[Path], path: Path) -> None:
    _concatenate(b"", parts, path)


class _CsvResults:
  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
    places, scores = found.places.tolist(), found.scores.tolist()
    with path.open("w", encoding="utf-8", newline="") as file:
      writer = csv.writer(file, lineterminator="\n")
      for row, uid, first, stop in _bounds(first_row, uids, found):
        ranked = enumerate(zip(places[first:stop], scores[first:stop], strict=True), 1)
        writer.writerows((row, uid, rank, *found.labels[place], score) for rank, (place, score) in ranked)

  def join(self, parts: Iterable[Path], path: Path) -> None:
    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(_CSV_COLUMNS)
    _concatenate(header.getvalue().encode(), parts, path)


class _ParquetResults:
  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
    type_ = _SCHEMA.field("predictions").type
    fields = list(type_.value_type)
    names = zip(*found.labels, strict=True) if found.labels else ((), (), ())
    labels = [pa.array(values, field.type) for values, field in zip(names, fields[:-1], strict=True)]
    columns = [values.take(pa.array(found.places)) for values in labels] + [pa.array(found.scores, pa.float32())]
    predictions = pa.StructArray.from_arrays(columns, fields=fields)
    offsets = pa.array(offsets_of(found.lengths), pa.int32())
    rows = pa.array(np.arange(first_row, first_row + len(uids)), pa.int64())
    arrays = [rows, pa.array(uids, pa.string()), pa.ListArray.from_arrays(offsets, predictions, type=type_)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA), path)

  def join(self, parts: Iterable[Path], path: Path) -> None:
    with pq.ParquetWriter(path, _SCHEMA) as writer:
      for part in parts:
        writer.write_table(pq.read_table(part, schema=_SCHEMA))


def _bounds(
  first_row: int, uids: Sequence[str | None], found: PredictionColumns
) -> Iterator[tuple[int, str | None, int, int]]:
  """Yields row and uid of each query, and where its predictions start and stop."""
  bounds = offsets_of(found.lengths).tolist()
  return zip(itertools.count(first_row), uids, bounds[:-1], bounds[1:])


def _concatenate(header: bytes, parts: Iterable[Path], path: Path) -> None:
  with path.open("wb") as file:
    file.write(header)
    for part in parts:
      file.write(part.read_bytes())
