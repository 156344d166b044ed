"""Reads the images of a raw folder from its parquet files, row by row."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.errors import InputError, listed

MAX_SLOT = 2**31 - 1
"""Largest slot that the prepared data can store. Models read at most five images of an item, slots 0 to 4 here."""

_BUFFER_BYTES = 1 << 20
_IMAGES_PER_READ = 256
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")


def read_images(path: Path | None, num_rows: int) -> Iterator[tuple[list[int], list[bytes]]]:
  """Yields the slots and the encoded images of every row of a split.

  Args:
    path: Parquet file with integer columns `row` and `slot` and a binary column `png` (or `image`, for other formats),
      sorted by row and slot. If it is None or does not exist, no row has images.
    num_rows: Number of rows of the split. A row without images yields empty lists.

  Raises:
    InputError: The file is not of this form. The message names it and the record (from 0) at fault.
  """
  images = _image_records(path, num_rows) if path and path.is_file() else iter(())
  pending = next(images, None)
  for row in range(num_rows):
    slots, blobs = [], []
    while pending is not None and pending[0] == row:
      slots.append(pending[1])
      blobs.append(pending[2])
      pending = next(images, None)
    yield slots, blobs


def open_parquet(path: Path) -> pq.ParquetFile:
  """Opens a parquet file of images for reading in small batches.

  Raises:
    InputError: The file cannot be read, or two columns have the same name.
  """
  try:
    # By default the images of a row group are read into memory as a whole.
    file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
  except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # The last one if a name of a column is damaged.
    raise unreadable_parquet(path, error) from error
  check_columns(path, file.schema_arrow)
  return file


def row_batches(
  file: pq.ParquetFile, size: int, columns: Sequence[str] | None, group: int | None = None
) -> Iterator[pa.RecordBatch]:
  """Yields the rows of a parquet file, or of one of its row groups, at most `size` at a time.

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
  """Checks that the pages of a parquet file have as many rows as its footer says.

  The headers of pages have no checksums, and pyarrow skips a page whose header gives an unknown kind of page.

  Raises:
    pa.ArrowInvalid: There are others.
  """
  if rows != expected:
    raise pa.ArrowInvalid(f"its pages have {rows} of the {expected} rows of its footer")


def check_columns(path: Path | str, schema: pa.Schema) -> None:
  """Checks that the names of the columns of a file differ.

  Raises:
    InputError: Two have the same name.
  """
  repeated = {name for name in schema.names if schema.names.count(name) > 1}
  if repeated:
    raise InputError(f"{path}: has two columns {listed([min(repeated)])}; remove or rename one")


def unreadable_parquet(path: Path, error: Exception) -> InputError:
  """Returns the error for a parquet file that `pyarrow` cannot read."""
  return InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy or write it again")


def is_encoded_image(blob: bytes) -> bool:
  """Returns whether bytes start like a PNG, JPEG, WebP, GIF or BMP file."""
  return blob.startswith(_IMAGE_MAGIC)


def out_of_range(row: int | None, slot: int | None, num_rows: int) -> str:
  """Returns what is wrong with the row or the slot of an image of a split with `num_rows` rows."""
  return f"row {row}, slot {slot} is out of range; rows are 0 to {num_rows - 1} and slots start at 0"


def _image_records(path: Path, num_rows: int) -> Iterator[tuple[int, int, bytes]]:
  """Yields row, slot and bytes of every image, checked."""
  last, record = (-1, -1), 0
  try:
    with open_parquet(path) as file:
      names = file.schema_arrow.names
      column = next((name for name in ("png", "image") if name in names), None)
      if column is None or not {"row", "slot"} <= set(names):
        raise InputError(f"{path}: columns must be row, slot, png; found {listed(names)}")
      wanted = ["row", "slot", column]
      for batch in row_batches(file, _IMAGES_PER_READ, wanted):
        values = (batch.column(name).to_pylist() for name in wanted)  # A batch has the column order of the file.
        for row, slot, blob in zip(*values, strict=True):
          _check_image(path, record, num_rows, row, slot, blob, last)
          last, record = (row, slot), record + 1
          yield row, slot, blob
  except (pa.ArrowException, OSError) as error:
    raise unreadable_parquet(path, error) from error


def _check_image(path: Path, record: int, num_rows: int, row: Any, slot: Any, blob: Any, last: tuple[int, int]) -> None:
  if type(row) is not int or type(slot) is not int or not isinstance(blob, bytes):
    raise InputError(f"{path}: record {record}: row and slot must be integers and the image must be bytes")
  if not 0 <= row < num_rows or not 0 <= slot <= MAX_SLOT:
    raise InputError(f"{path}: record {record}: {out_of_range(row, slot, num_rows)}")
  if (row, slot) <= last:
    raise InputError(
      f"{path}: record {record}: row {row}, slot {slot} comes after row {last[0]}, slot {last[1]}; sort the file by "
      "row and slot, with each pair once"
    )
  if not is_encoded_image(blob):
    raise InputError(f"{path}: record {record}: row {row}, slot {slot} is not a PNG, JPEG, WebP, GIF or BMP image")
