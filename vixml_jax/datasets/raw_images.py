"""Reads the images of a raw folder from its parquet files, row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vixml_jax.errors import InputError, listed
from vixml_jax.parquet_files import open_parquet, read_errors, row_batches

MAX_SLOT = 2**31 - 1
"""Largest slot that the prepared data can store. Models read at most five images of an item, slots 0 to 4 here."""

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


def is_encoded_image(blob: bytes) -> bool:
  """Returns whether bytes start like a PNG, JPEG, WebP, GIF or BMP file."""
  return blob.startswith(_IMAGE_MAGIC)


def out_of_range(row: int | None, slot: int | None, num_rows: int) -> str:
  """Returns what is wrong with the row or the slot of an image of a split with `num_rows` rows."""
  return f"row {row}, slot {slot} is out of range; rows are 0 to {num_rows - 1} and slots start at 0"


def _image_records(path: Path, num_rows: int) -> Iterator[tuple[int, int, bytes]]:
  """Yields row, slot and bytes of every image, checked."""
  last, record = (-1, -1), 0
  with read_errors(path), open_parquet(path) as file:
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
