"""Reads CSV files and files of JSON lines, packed or not, record by record; names the line of every mistake."""

import codecs
from collections.abc import Generator, Iterator
import contextlib
import csv
import gzip
import io
import json
from pathlib import Path
from typing import IO, Any, AnyStr, cast
import zlib

from vixml_jax.errors import InputError, listed

MAX_LINE = 2**26
"""Most bytes of a line, and most characters of a CSV cell. Vectors and images in base64 are long, but a packed file of
some kilobytes can have a line that does not fit into memory, and a quote that is not closed must end somewhere."""
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_JSON_SPACE = " \t\n\r"


class CsvFile:
  """A CSV file in UTF-8 whose first line names the columns.

  Attributes:
    path: Path of the file.
    delimiter: Character between cells.
    columns: Names of the columns.
  """

  def __init__(self, path: Path, delimiter: str = ","):
    """Reads the header.

    Args:
      path: Path of the file; a name that ends in `.gz` is that of a packed file.
      delimiter: Character between cells.

    Raises:
      InputError: The file cannot be read, is empty, or has two columns with the same name.
    """
    self.path, self.delimiter = path, delimiter
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
    with contextlib.closing(self._records()) as records:
      columns = next((cells for _, cells in records), None)
    if columns is None:
      raise InputError(f"{path}: is empty; its first line must name the columns")
    repeated = {name for name in columns if columns.count(name) > 1}
    if repeated:
      raise InputError(f"{path}:1: has two columns {listed([min(repeated)])}; remove or rename one")
    self.columns: list[str] = columns

  def rows(self) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of the first line, and the cells, of every row; empty lines are ignored.

    Raises:
      InputError: A row has another number of cells than the header, or is not valid CSV in UTF-8.
    """
    records = self._records()
    next(records)
    for line, cells in records:
      if len(cells) == len(self.columns):
        yield line, cells
      elif cells:
        raise InputError(
          f"{self.path}:{line}: has {len(cells)} cells for {len(self.columns)} columns; is the file truncated, or is a "
          f"{_DELIMITERS.get(self.delimiter, self.delimiter)} not in quotes?"
        )

  def _records(self) -> Generator[tuple[int, list[str]]]:
    start = 1
    with open_packed(self.path) as file, io.TextIOWrapper(cast(Any, file), "utf-8-sig", newline="") as text:
      reader = csv.reader(bounded_lines(text, self.path), delimiter=self.delimiter, strict=True)
      try:
        for cells in reader:
          yield start, cells
          start = reader.line_num + 1
      except UnicodeDecodeError as error:
        raise not_utf8(self.path) from error
      except csv.Error as error:
        raise InputError(
          f"{self.path}:{start}: not valid CSV in UTF-8 ({error}); is the file truncated, or a quote not closed?"
        ) from error


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
  """Yields number and JSON value of every line; blank lines are ignored.

  Args:
    path: Path of the file; a name that ends in `.gz` is that of a packed file.

  Raises:
    InputError: The file cannot be read, or a line is not JSON in UTF-8.
  """
  for line, raw in filled_lines(path):
    yield line, parse_json(raw, f"{path}:{line}", "is the file truncated?")


def filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """Yields number and bytes of every line that is not blank.

  Args:
    path: Path of the file; a name that ends in `.gz` is that of a packed file.

  Raises:
    InputError: The file cannot be read.
  """
  with open_packed(path) as file:
    for line, raw in enumerate(bounded_lines(file, path), 1):
      if raw.strip():
        yield line, raw


def bounded_lines(file: IO[AnyStr], name: object) -> Iterator[AnyStr]:
  """Yields the lines of a file.

  Args:
    file: The file.
    name: Its name in messages.

  Raises:
    InputError: A line has more than `MAX_LINE` bytes or characters.
  """
  number = 0
  while line := file.readline(MAX_LINE + 1):
    number += 1
    if len(line) > MAX_LINE:
      raise InputError(f"{name}:{number}: has more than {MAX_LINE:,} bytes; split the line, or copy the file again")
    yield line


def parse_json(text: bytes, where: str, advice: str) -> Any:
  """Returns a JSON value.

  Args:
    text: JSON in UTF-8.
    where: Name of its place in error messages.
    advice: End of the error message.

  Raises:
    InputError: The text is not JSON in UTF-8.
  """
  try:
    stripped = text.removeprefix(codecs.BOM_UTF8).decode().strip(_JSON_SPACE)
    value, stop = JSON.raw_decode(stripped)  # json.loads takes twice as long for a short line.
    if stop < len(stripped):
      raise json.JSONDecodeError("Extra data", stripped, stop)
    return value
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: not valid JSON in UTF-8 ({json_fault(error)}); {advice}") from error


def json_fault(error: ValueError | RecursionError) -> str:
  """Returns what is wrong with a text for which `JSON` raised an error."""
  if isinstance(error, RecursionError):
    return "nested too deep"
  if "set_int_max_str_digits" in str(error):
    return "an integer has more than 4,300 digits"
  return str(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    raise ValueError(f"key {listed([next(key for key in keys if keys.count(key) > 1)])} occurs twice")
  return found


JSON = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON, and raises ValueError for an object with two equal keys, of which `json.loads` would take the last."""


@contextlib.contextmanager
def open_packed(path: Path) -> Iterator[IO[bytes]]:
  """Opens a file for reading bytes, and unpacks it if its name ends in `.gz`.

  Raises:
    InputError: The file cannot be opened, or the packed file is damaged.
  """
  try:
    packed = path.open("rb")
  except OSError as error:
    raise InputError(f"{path}: cannot be read ({error.strerror}); check its name and permissions") from error
  with packed:
    try:
      yield cast(IO[bytes], gzip.GzipFile(fileobj=packed)) if path.suffix == ".gz" else packed
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
      raise InputError(f"{path}: is truncated, damaged or not a gzip file ({error}); copy or pack it again") from error


def not_utf8(path: Path) -> InputError:
  """Returns the error for a file that is not UTF-8; the message names the first such line and byte."""
  with open_packed(path) as file:
    for line, raw in enumerate(bounded_lines(file, path), 1):
      try:
        raw.decode()
      except UnicodeDecodeError as error:
        return InputError(
          f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line); convert "
          "the file, for example with iconv -t UTF-8"
        )
  return InputError(f"{path}: not UTF-8; convert the file, for example with iconv -t UTF-8")
