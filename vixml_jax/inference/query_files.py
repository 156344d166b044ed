"""Files of queries, read a block at a time: JSON lines, CSV and Parquet.

Every reader yields the queries in the order of the file. Errors name the file and the line (Parquet: the row).
"""

from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError
from vixml_jax.inference.queries import LISTS, Query, QueryFormat
from vixml_jax.parquet_files import open_parquet, read_errors, row_batches
from vixml_jax.record_files import CsvFile, filled_lines, parse_json

_SEPARATOR = ";"
_ROWS_AT_ONCE = 4096


class QueryFile(Protocol):
  """A file of queries, cut into numbered blocks of consecutive queries.

  Of blocks that are not wanted, only the ends of lines or the numbers of rows are read.
  """

  def check(self, size: int, wanted: Callable[[int], bool], look: Callable[[Query], None]) -> int:
    """Checks queries, except for their images, and returns the number of all queries.

    Args:
      size: Number of queries in a block.
      wanted: Returns whether the block of a number is to be read.
      look: Called with every query of these blocks.
    """

  def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Query]]]:
    """Yields number and queries of each wanted block; arguments as for `check`."""


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


# A row of a file that is parsed when it is wanted.
_Row = Callable[[], Query]


def _in_blocks(rows: Iterator[_Row], size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Query]]]:
  for number in itertools.count():
    taken = itertools.islice(rows, size)
    if wanted(number):
      if not (block := [parse() for parse in taken]):
        return
      yield number, block
    elif not sum(1 for _ in taken):
      return


def _count(
  path: Path, rows: Iterator[_Row], size: int, wanted: Callable[[int], bool], look: Callable[[Query], None]
) -> int:
  count = 0
  for parse in rows:
    if wanted(count // size):
      look(parse())
    count += 1
  if not count:
    raise InputError(f"{path}: has no queries; add at least one")
  return count


class _JsonLinesQueries:
  """An object per line; blank lines are ignored."""

  def __init__(self, path: Path, form: QueryFormat):
    self._path, self._form = path, form

  def check(self, size: int, wanted: Callable[[int], bool], look: Callable[[Query], None]) -> int:
    return _count(self._path, self._rows(), size, wanted, look)

  def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Query]]]:
    return _in_blocks(self._rows(), size, wanted)

  def _rows(self) -> Iterator[_Row]:
    for line, raw in filled_lines(self._path):
      yield functools.partial(self._parse, raw, line)

  def _parse(self, raw: bytes, line: int) -> Query:
    where = f"{self._path}:{line}"
    return self._form.parse(parse_json(raw, where, "is the file truncated?"), where, self._path.parent)


class _CsvQueries:
  """A header, then a query per line; an empty cell counts as no value."""

  def __init__(self, path: Path, form: QueryFormat):
    self._file, self._form = CsvFile(path), form
    form.check_keys(self._file.columns, f"{path}:1")

  def check(self, size: int, wanted: Callable[[int], bool], look: Callable[[Query], None]) -> int:
    return _count(self._file.path, self._rows(), size, wanted, look)

  def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Query]]]:
    return _in_blocks(self._rows(), size, wanted)

  def _rows(self) -> Iterator[_Row]:
    for line, cells in self._file.rows():
      yield functools.partial(self._parse, cells, line)

  def _parse(self, cells: list[str], line: int) -> Query:
    path = self._file.path
    where = f"{path}:{line}"
    return self._form.parse(self._record(cells, where), where, path.parent)

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
      schema, self._num_rows = file.schema_arrow, file.metadata.num_rows
    form.check_keys(schema.names, str(path))
    for name in schema.names:
      if not _fits(name, schema.field(name).type):
        raise InputError(
          f"{path}: column {name!r} is {schema.field(name).type}; it must be {_TYPES.get(name, 'string')}"
        )
    self._names = schema.names
    if not self._num_rows:
      raise InputError(f"{path}: has no queries; add at least one")

  def check(self, size: int, wanted: Callable[[int], bool], look: Callable[[Query], None]) -> int:
    # Images may take gigabytes, and the schema has been checked already.
    names = [name for name in self._names if name != "images"]
    for _, queries in self._pieces(size, wanted, names, _ROWS_AT_ONCE):
      for query in queries:
        look(query)
    return self._num_rows

  def blocks(self, size: int, wanted: Callable[[int], bool]) -> Iterator[tuple[int, list[Query]]]:
    pieces = self._pieces(size, wanted, self._names, size)
    for number, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
      yield number, [query for _, queries in group for query in queries]

  def _pieces(
    self, size: int, wanted: Callable[[int], bool], names: list[str], rows: int
  ) -> Iterator[tuple[int, list[Query]]]:
    """Yields the wanted blocks in pieces: a block may end in another row group. Reads `rows` rows at a time."""
    row = 0
    with self._file() as file:
      for group in range(file.metadata.num_row_groups):
        end = row + file.metadata.row_group(group).num_rows
        if any(map(wanted, range(row // size, -(-end // size)))):
          batches = row_batches(file, rows, names, group)
          while (batch := self._next(batches)) is not None:
            while len(batch):
              number = row // size
              taken = batch.slice(0, (number + 1) * size - row)
              if wanted(number):
                yield number, self._queries(taken, names, row)
              row, batch = row + len(taken), batch.slice(len(taken))
        row = end

  def _queries(self, batch: pa.RecordBatch, names: list[str], row: int) -> list[Query]:
    """Returns the queries of a batch whose first one is row `row` of the file."""
    columns = [_values(batch.column(name)) for name in names]
    return [
      self._form.parse(dict(zip(names, values, strict=True)), f"{self._path}: row {number}", self._path.parent)
      for number, values in enumerate(zip(*columns, strict=True), row)
    ]

  def _file(self) -> pq.ParquetFile:
    with self._read_errors():
      return open_parquet(self._path)

  def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
    with self._read_errors():
      return next(batches, None)

  def _read_errors(self) -> contextlib.AbstractContextManager[None]:
    return read_errors(self._path, "cannot be read as Parquet", "is the file truncated?")


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
