"""Files of predictions, written a block of queries at a time and joined at the end: JSON lines, CSV and Parquet."""

from collections.abc import Callable, Iterable, Sequence
import csv
from json.encoder import encode_basestring as _quoted
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vixml_jax.errors import InputError
from vixml_jax.inference.predictions import PredictionColumns
from vixml_jax.ragged import offsets_of, ranges

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
_TEXT = pa.large_string()
_CSV_COLUMNS = ("row", "uid", "rank", "label", "id", "text", "score")


class ResultFormat(Protocol):
  """A format of predictions."""

  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
    """Writes one part: the predictions for consecutive queries, which start at row `first_row` of their file.

    A part is a file of this format by itself.
    """

  def join(self, parts: Iterable[Path], path: Path) -> None:
    """Writes all parts to one file, one after the other."""


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
    # Most of an object depends on the label only.
    starts = [
      f'{{"label": {_quoted(uid)}, "id": {label}, "text": {_quoted(text)}, "score": '
      for uid, label, text in found.labels
    ]
    objects = _joined("", _texts(starts).take(pa.array(found.places)), _numbers(found.scores), "}")
    lists = pa.LargeListArray.from_arrays(pa.array(offsets_of(found.lengths)), objects)
    heads = [
      f'{{"row": {row}, "uid": {"null" if uid is None else _quoted(uid)}, "predictions": ['
      for row, uid in enumerate(uids, first_row)
    ]
    _write_texts(path, b"", _joined("", _texts(heads), pc.binary_join(lists, pa.scalar(", ", _TEXT)), "]}\n"))

  def join(self, parts: Iterable[Path], path: Path) -> None:
    _concatenate(b"", parts, path)


class _CsvResults:
  def write(self, path: Path, first_row: int, uids: Sequence[str | None], found: PredictionColumns) -> None:
    rows = np.repeat(np.arange(len(uids)), found.lengths)
    heads = _texts(_csv_lines(enumerate(uids, first_row))).take(pa.array(rows))
    ranks = pa.array(ranges(1, found.lengths)).cast(_TEXT)
    labels = _texts(_csv_lines(found.labels)).take(pa.array(found.places))
    lines = _joined(",", heads, ranks, labels, _numbers(found.scores))
    _write_texts(path, _csv_header(), _joined("", lines, "\n"))

  def join(self, parts: Iterable[Path], path: Path) -> None:
    _concatenate(_csv_header(), parts, path)


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


def _csv_header() -> bytes:
  return "".join(f"{line}\n" for line in _csv_lines([_CSV_COLUMNS])).encode()


def _csv_lines(rows: Iterable[Iterable[Any]]) -> list[str]:
  """Returns lines of CSV without their ends."""
  lines: list[str] = []
  csv.writer(SimpleNamespace(write=lines.append), lineterminator="\n").writerows(rows)
  return [line[:-1] for line in lines]


def _texts(texts: list[str]) -> pa.Array:
  return pa.array(texts, _TEXT)


def _joined(separator: str, *columns: pa.Array | str) -> pa.Array:
  """Returns the texts of each row, joined."""
  scalars = (pa.scalar(column, _TEXT) if isinstance(column, str) else column for column in (*columns, separator))
  return pc.binary_join_element_wise(*scalars)


def _numbers(values: np.ndarray) -> pa.Array:
  """Returns what `repr` returns for each finite number."""
  doubles = np.asarray(values, np.float64)
  sizes = np.abs(doubles)
  texts = pa.array(doubles).cast(_TEXT)
  # Arrow has other rules for the exponent, and writes whole numbers without a point.
  others = ~((sizes >= 1e-4) & (sizes < 1e9)) | (doubles == np.rint(doubles))
  if not others.any():
    return texts
  return pc.replace_with_mask(texts, pa.array(others), _texts([repr(value) for value in doubles[others].tolist()]))


def _write_texts(path: Path, header: bytes, texts: pa.Array) -> None:
  """Writes a header and the texts, one after the other, in UTF-8."""
  _, offsets, content = texts.buffers()
  with path.open("wb") as file:
    file.write(header)
    if content:
      file.write(memoryview(content)[: np.frombuffer(offsets, np.int64)[len(texts)]])


def _concatenate(header: bytes, parts: Iterable[Path], path: Path) -> None:
  """Writes the parts, of which each starts with the header, to one file that has the header once."""
  with path.open("wb") as file:
    file.write(header)
    for part in parts:
      file.write(memoryview(part.read_bytes())[len(header) :])
