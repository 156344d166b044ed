"""Files of queries, read a block at a time: JSON lines, CSV and Parquet.

Every reader yields the queries in the order of the file. Errors name the file and the line (Parquet: the row).
"""

from collections.abc import Callable, Iterator
import itertools
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError
from vixml_jax.inference.queries import LISTS, Query, QueryFormat
from vixml_jax.record_files import CsvFile, json_lines, parse_json

_SEPARATOR = ";"
_ROWS_AT_ONCE = 4096


class QueryFile(Protocol):
  """A file of queries."""

  def check(self, look: Callable[[Query], None]) -> int:
    """Reads the whole file except for images, passes every query to `look`, and returns the number of queries."""

  def blocks(self, size: int) -> Iterator[list[Query]]:
    """Yields all queries, `size` at a time."""


def open_queries(path: Path, form: QueryFormat) -> QueryFile:
  """Opens a file of queries, by the suffix of its name.

  Args:
    path: `.jsonl`, an object per line; `.csv` with a header, in which a list is JSON or its values are separated by
      semicolons; or `.parquet`. Keys and columns are `queries.KEYS`. Relative paths of images start at the file's
      folder.
    form: Form of queries that the model takes.

  Raises:
    InputError: The file does not exist, its suffix is unknown, or columns are unknown or missing.
  """
  readers: dict[str, Callable[[Path, QueryFormat], QueryFile]] = {
    ".jsonl": _JsonLinesQueries,
    ".csv": _CsvQueries,
    ".parquet": _ParquetQueries,
  }
  if path.suffix not in readers:
    raise InputError(f"{path}: files of queries end in {', '.join(readers)}; convert or rename it")
  if not path.is_file():
    raise InputError(f"{path}: no such file; --queries must name one")
  return readers[path.suffix](path, form)


def _in_blocks(queries: Iterator[Query], size: int) -> Iterator[list[Query]]:
  while block := list(itertools.islice(queries, size)):
    yield block


def _count(path: Path, queries: Iterator[Query], look: Callable[[Query], None]) -> int:
  count = 0
  for query in queries:
    look(query)
    count += 1
  if not count:
    raise InputError(f"{path}: has no queries; add at least one")
  return count


class _JsonLinesQueries:
  """An object per line; blank lines are ignored."""

  def __init__(self, path: Path, form: QueryFormat):
    self._path, self._form = path, form

  def check(self, look: Callable[[Query], None]) -> int:
    return _count(self._path, self._queries(), look)

  def blocks(self, size: int) -> Iterator[list[Query]]:
    return _in_blocks(self._queries(), size)

  def _queries(self) -> Iterator[Query]:
    for line, value in json_lines(self._path):
      yield self._form.parse(value, f"{self._path}:{line}", self._path.parent)


class _CsvQueries:
  """A header, then a query per line; an empty cell counts as no value."""

  def __init__(self, path: Path, form: QueryFormat):
    self._file, self._form = CsvFile(path), form
    form.check_keys(self._file.columns, f"{path}:1")

  def check(self, look: Callable[[Query], None]) -> int:
    return _count(self._file.path, self._queries(), look)

  def blocks(self, size: int) -> Iterator[list[Query]]:
    return _in_blocks(self._queries(), size)

  def _queries(self) -> Iterator[Query]:
    path = self._file.path
    for line, cells in self._file.rows():
      where = f"{path}:{line}"
      yield self._form.parse(self._record(cells, where), where, path.parent)

  def _record(self, cells: list[str], where: str) -> dict[str, Any]:
    record: dict[str, Any] = {self._form.required: ""}
    for name, cell in zip(self._file.columns, cells, strict=True):
      if cell:
        record[name] = _cell_list(cell, f"{where}: {name!r}") if name in LISTS else cell
    return record


class _ParquetQueries:
  """A query per row. Images are lists of binary, of paths, or of vectors of floats."""

  def __init__(self, path: Path, form: QueryFormat):
    self._path, self._form = path, form
    with self._file() as file:
      schema, num_rows = file.schema_arrow, file.metadata.num_rows
    form.check_keys(schema.names, str(path))
    for name in schema.names:
      if not _fits(name, schema.field(name).type):
        raise InputError(
          f"{path}: column {name!r} is {schema.field(name).type}; it must be {_TYPES.get(name, 'string')}"
        )
    self._names = schema.names
    if not num_rows:
      raise InputError(f"{path}: has no queries; add at least one")

  def check(self, look: Callable[[Query], None]) -> int:
    # Images may take gigabytes, and the schema has been checked already.
    names = [name for name in self._names if name != "images"]
    return _count(self._path, self._queries(_ROWS_AT_ONCE, names), look)

  def blocks(self, size: int) -> Iterator[list[Query]]:
    # A batch of pyarrow may end where a row group ends, so blocks are cut here.
    return _in_blocks(self._queries(size, self._names), size)

  def _queries(self, size: int, names: list[str]) -> Iterator[Query]:
    row = 0
    with self._file() as file:
      batches = file.iter_batches(batch_size=size, columns=names)
      while (batch := self._reading(lambda: next(batches, None))) is not None:
        columns = {name: _values(batch.column(name)) for name in names}
        for i in range(batch.num_rows):
          record = {name: values[i] for name, values in columns.items()}
          yield self._form.parse(record, f"{self._path}: row {row}", self._path.parent)
          row += 1

  def _file(self) -> pq.ParquetFile:
    return self._reading(lambda: pq.ParquetFile(self._path))

  def _reading(self, read: Callable[[], Any]) -> Any:
    try:
      return read()
    except (OSError, pa.ArrowException) as error:
      raise InputError(
        f"{self._path}: cannot be read as Parquet ({str(error).splitlines()[0]}); is the file truncated?"
      ) from error


_TYPES = {
  "images": "a list of binary, string or lists of floats",
  "allow": "a list of strings",
  "deny": "a list of strings",
  "categories": "a list of strings",
  "uid": "string or a whole number",
}


def _fits(name: str, found: pa.DataType) -> bool:
  """Returns whether a column of this name may have this type."""
  if name in LISTS:
    if not _is_list(found):
      return False
    inner = found.value_type
    vectors = _is_list(inner) and pa.types.is_floating(inner.value_type)
    return _is_text(inner) or (name == "images" and (_is_binary(inner) or vectors))
  return _is_text(found) or (name == "uid" and pa.types.is_integer(found))


def _is_list(found: pa.DataType) -> bool:
  return pa.types.is_list(found) or pa.types.is_large_list(found) or pa.types.is_fixed_size_list(found)


def _is_text(found: pa.DataType) -> bool:
  return pa.types.is_string(found) or pa.types.is_large_string(found)


def _is_binary(found: pa.DataType) -> bool:
  return pa.types.is_binary(found) or pa.types.is_large_binary(found)


def _values(column: pa.Array) -> list[Any]:
  """Returns the Python values of a column. Vectors become arrays: Python lists would hold an object per number."""
  if not (_is_list(column.type) and _is_list(column.type.value_type)):
    return column.to_pylist()
  return [
    None
    if images is None
    else [vector.values.to_numpy(zero_copy_only=False) if vector.is_valid else None for vector in images]
    for images in (scalar.values if scalar.is_valid else None for scalar in column)
  ]


def _cell_list(cell: str, where: str) -> list[Any]:
  """Returns the list in a CSV cell: JSON, or values separated by semicolons."""
  if not cell.lstrip().startswith("["):
    return [part.strip() for part in cell.split(_SEPARATOR)]
  return parse_json(cell.encode(), where, "separate values by semicolons unless the cell is a JSON list")
