"""Reads Parquet files in small batches, and notices damage that pyarrow passes over."""

from collections.abc import Iterator, Sequence
import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError, listed

_BUFFER_BYTES = 1 << 20


def open_parquet(path: Path) -> pq.ParquetFile:
  """Opens a Parquet file to read it in small batches. The checksums of its pages are verified.

  Raises:
    InputError: Two columns have the same name.
    pa.ArrowException, OSError, UnicodeDecodeError: The file cannot be read; see `read_errors`.
  """
  # By default, whole column chunks are read into memory; images may take gigabytes.
  file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
  check_column_names(path, file.schema_arrow)
  return file


@contextlib.contextmanager
def read_errors(
  name: Path | str, fault: str = "not a readable parquet file", advice: str = "copy or write it again"
) -> Iterator[None]:
  """Raises the errors of pyarrow about a file that it cannot read as `InputError`.

  Args:
    name: Name of the file in the message.
    fault: What is wrong with it.
    advice: What to do.
  """
  try:
    yield
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # The last one if a name of a column is damaged.
    raise InputError(f"{name}: {fault} ({str(error).splitlines()[0]}); {advice}") from error


def row_batches(
  file: pq.ParquetFile, size: int, columns: Sequence[str] | None, group: int | None = None
) -> Iterator[pa.RecordBatch]:
  """Yields the rows of a Parquet file, or of one of its row groups, at most `size` at a time.

  Raises:
    pa.ArrowInvalid: There are fewer rows than the footer says.
  """
  metadata, rows = file.metadata, 0
  groups = None if group is None else [group]
  for batch in file.iter_batches(size, row_groups=groups, columns=columns):
    rows += len(batch)
    yield batch
  check_num_rows(rows, metadata.num_rows if group is None else metadata.row_group(group).num_rows)


def check_num_rows(rows: int, expected: int) -> None:
  """Checks that the pages of a Parquet file have as many rows as its footer says.

  The headers of pages have no checksums, and pyarrow skips a page whose header gives an unknown kind of page.

  Raises:
    pa.ArrowInvalid: There are others.
  """
  if rows != expected:
    raise pa.ArrowInvalid(f"its pages have {rows} of the {expected} rows of its footer")


def check_column_names(name: Path | str, schema: pa.Schema) -> None:
  """Checks that the names of the columns of a file differ.

  Args:
    name: Name of the file in the message.
    schema: Its columns.

  Raises:
    InputError: Two have the same name.
  """
  repeated = {column for column in schema.names if schema.names.count(column) > 1}
  if repeated:
    raise InputError(f"{name}: has two columns {listed([min(repeated)])}; remove or rename one")
