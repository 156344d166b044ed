"""Parts of a table: a file, an Arrow table or a list of dicts, all read in the same way, batch by batch."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.parquet_files import check_column_names, open_parquet, read_errors, row_batches
from vixml_jax.record_files import CsvFile, json_lines

_JSON_ROWS_FOR_COLUMNS = 1000
_ARROW_MAGIC = b"ARROW1"


@dataclasses.dataclass(frozen=True)
class RowBatch:
  """Rows that follow one another.

  Attributes:
    columns: The Python values of each column.
    where: Returns the place of row i of the batch, for messages.
  """

  columns: Mapping[str, Sequence[Any]]
  where: Callable[[int], str]


class Part(Protocol):
  """A part of a table.

  Attributes:
    name: Name in messages: a path, or "the table".
    folder: Folder where relative paths of images start.
    columns: Names of the columns.
  """

  name: str
  folder: Path
  columns: list[str]

  def batches(self, names: Sequence[str], size: int) -> Iterator[RowBatch]:
    """Yields the named columns, at most `size` rows at a time. A value that is absent is None, or "" in CSV.

    Raises:
      InputError: The part cannot be read; the message names the file and the line.
    """

  def fingerprint(self) -> str:
    """Returns a hash of the contents."""


class CsvPart:
  """A CSV or TSV file. All its values are texts."""

  def __init__(self, path: Path, delimiter: str):
    self._file = CsvFile(path, delimiter)
    self.name, self.folder, self.columns = str(path), path.parent, self._file.columns

  def batches(self, names: Sequence[str], size: int) -> Iterator[RowBatch]:
    """Yields columns; see `Part`."""
    places = [self.columns.index(name) for name in names]
    for block in _in_blocks(self._file.rows(), size):
      columns = {name: [cells[place] for _, cells in block] for name, place in zip(names, places, strict=True)}
      yield RowBatch(columns, _at_lines(self.name, [line for line, _ in block]))

  def fingerprint(self) -> str:
    """Returns the sha256 of the file."""
    return sha256_of_file(self.name)


class JsonLinesPart:
  """A file with a JSON object per line. Its columns are the keys of the first thousand objects."""

  def __init__(self, path: Path):
    self._path = path
    self.name, self.folder = str(path), path.parent
    with contextlib.closing(self._records()) as records:
      first = itertools.islice(records, _JSON_ROWS_FOR_COLUMNS)
      self.columns = list(dict.fromkeys(key for _, record in first for key in record))

  def batches(self, names: Sequence[str], size: int) -> Iterator[RowBatch]:
    """Yields columns; see `Part`."""
    for block in _in_blocks(self._records(), size):
      columns = {name: [record.get(name) for _, record in block] for name in names}
      yield RowBatch(columns, _at_lines(self.name, [line for line, _ in block]))

  def fingerprint(self) -> str:
    """Returns the sha256 of the file."""
    return sha256_of_file(self._path)

  def _records(self) -> Generator[tuple[int, dict[str, Any]]]:
    for line, record in json_lines(self._path):
      if not isinstance(record, dict):
        raise InputError(f"{self._path}:{line}: must be a JSON object such as {{'text': ..., 'labels': [...]}}")
      yield line, record


class ArrowPart:
  """A Parquet file, an Arrow file or stream, or an Arrow table in memory.

  Columns with names of classes, as Hugging Face stores them, have these names as values and not their numbers.
  """

  def __init__(self, source: Path | pa.Table, name: str):
    self._source = source
    self.name = name
    self.folder = source.parent if isinstance(source, Path) else Path()
    with self._opened(1, None) as (schema, _):
      self.columns = list(schema.names)
    check_column_names(name, schema)
    self._classes = _class_names(schema)

  def batches(self, names: Sequence[str], size: int) -> Iterator[RowBatch]:
    """Yields columns; see `Part`."""
    start = 0
    with self._opened(size, list(names)) as (_, batches):
      for whole in batches:
        for offset in range(0, whole.num_rows, size):
          batch = whole.slice(offset, size)
          columns = {name: self._values(name, batch.column(name), start) for name in names}
          yield RowBatch(columns, _at_rows(self.name, start))
          start += batch.num_rows

  def fingerprint(self) -> str:
    """Returns the sha256 of the file, or a hash of all values in memory."""
    if isinstance(self._source, Path):
      return sha256_of_file(self._source)
    sink = _HashSink()
    with pa.ipc.new_stream(pa.PythonFile(sink, "w"), self._source.schema) as stream:
      stream.write_table(self._source)
    return sink.digest.hexdigest()

  def _values(self, name: str, column: pa.Array, start: int) -> list[Any]:
    values = column.to_pylist()
    classes = self._classes.get(name)
    if classes is None:
      return values
    return [_named(value, classes, self.name, name, start + row) for row, value in enumerate(values)]

  @contextlib.contextmanager
  def _opened(self, size: int, names: list[str] | None) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yields the schema and the batches, which may be larger than `size`."""
    with read_errors(self.name, "cannot be read", "is the file truncated?"):
      if isinstance(self._source, pa.Table):
        yield self._source.schema, iter(self._source.to_batches(size))
      elif self._source.suffix == ".parquet":
        with open_parquet(self._source) as file:
          yield file.schema_arrow, row_batches(file, size, names)
      else:
        with pa.memory_map(str(self._source)) as stream:
          yield _arrow_batches(stream)


class RecordsPart:
  """A list of dicts in memory."""

  def __init__(self, records: Sequence[Mapping[str, Any]], name: str):
    wrong = next((row for row, record in enumerate(records) if not isinstance(record, Mapping)), None)
    if wrong is not None:
      raise InputError(f"{name}: row {wrong}: must be a dict, not {type(records[wrong]).__name__}")
    self._records = records
    self.name, self.folder = name, Path()
    self.columns = list(dict.fromkeys(str(key) for record in records for key in record))

  def batches(self, names: Sequence[str], size: int) -> Iterator[RowBatch]:
    """Yields columns; see `Part`."""
    for start in range(0, len(self._records), size):
      block = self._records[start : start + size]
      columns = {name: [record.get(name) for record in block] for name in names}
      yield RowBatch(columns, _at_rows(self.name, start))

  def fingerprint(self) -> str:
    """Returns a hash of all values."""
    digest = hashlib.sha256()
    for record in self._records:
      digest.update(json.dumps(record, sort_keys=True, default=_hashable).encode())
    return digest.hexdigest()


class _HashSink(io.RawIOBase):
  """A file that keeps only the hash of what is written to it."""

  def __init__(self) -> None:
    self.digest = hashlib.sha256()

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    self.digest.update(data)
    return len(data)


def _in_blocks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
  while block := list(itertools.islice(rows, size)):
    yield block


def _at_lines(name: str, lines: list[int]) -> Callable[[int], str]:
  return lambda row: f"{name}:{lines[row]}"


def _at_rows(name: str, start: int) -> Callable[[int], str]:
  return lambda row: f"{name}: row {start + row}"


def _hashable(value: Any) -> Any:
  """Returns a JSON value that stands for a value that JSON does not have."""
  if isinstance(value, bytes | bytearray | memoryview):
    return {"sha256": hashlib.sha256(value).hexdigest()}
  return repr(value)


def _arrow_batches(stream: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
  """Returns the schema and the batches of an Arrow stream, or of an Arrow file, which starts with a magic word."""
  is_file = stream.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
  stream.seek(0)
  if not is_file:
    reader = pa.ipc.open_stream(stream)
    return reader.schema, iter(reader)
  file = pa.ipc.open_file(stream)
  return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
  """Returns the names of the classes of each column that has them, from the metadata that Hugging Face writes."""
  try:
    features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    return {name: classes for name, feature in features.items() if (classes := _names_of(feature))}
  except (KeyError, TypeError, ValueError, AttributeError):
    return {}


def _names_of(feature: Any) -> list[str] | None:
  """Returns the names of the classes of a feature, or of the items of a list."""
  if isinstance(feature, list) and len(feature) == 1:  # Lists as old versions describe them.
    return _names_of(feature[0])
  if not isinstance(feature, dict):
    return None
  return feature["names"] if feature.get("_type") == "ClassLabel" else _names_of(feature.get("feature"))


def _named(value: Any, classes: list[str], part: str, column: str, row: int) -> Any:
  """Returns the name of a class, or the names of a list of classes; -1 stands for no class."""
  if isinstance(value, list):
    return [_named(item, classes, part, column, row) for item in value]
  if value is None or value == -1:
    return None
  if not 0 <= value < len(classes):
    raise InputError(f"{part}: row {row}, column {column!r}: class {value} has no name; there are {len(classes)}")
  return classes[value]
