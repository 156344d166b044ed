"""Where encoded images come from: the prepared data set, folders of files, or parquet (img2dataset's as well).

A source gives the images of one split in parts of at most a few thousand, in any order of rows, so that each part can
be finished and kept by itself.
"""

from collections.abc import Iterator, Sequence
import glob
import os
from pathlib import Path
import re
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from vixml_jax.datasets import raw
from vixml_jax.datasets.records import Records
from vixml_jax.errors import InputError
from vixml_jax.ragged import offsets_of

PART_IMAGES = 2048
"""Images of a part of a folder or a parquet file."""
PART_ROWS = 1024
"""Rows of a part of a prepared data set; how many images they have is known when they are read."""

PREFIXES = {"train": "trn", "test": "tst", "labels": "lbl"}
_COLUMNS = ("png", "jpg", "jpeg", "webp", "image", "bytes")
_CHUNK = 256
_MAX_SLOT = 2**31 - 1
_FILE_NAME = re.compile(r"(\d+)(?:_(\d+))?\.\w+")


class EncodedImage(NamedTuple):
  """Slot `slot` of row `row`: the encoded bytes, a file that holds them, or None for an image that is missing."""

  row: int
  slot: int
  blob: bytes | Path | None


class ImageSource(Protocol):
  """The images of one split.

  Attributes:
    num_parts: number of parts.
    identity: what tells this source's contents from another's, as JSON.
  """

  num_parts: int
  identity: Any

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    """Number and images of the given ascending parts; a part comes in one or more pieces, also if it is empty."""


def open_sources(images: str, builder: tfds.core.DatasetBuilder) -> dict[str, ImageSource]:
  """The images of `train`, `test` and `labels`.

  Args:
    images: "" for those in the prepared data set. Or a folder that holds, for each split with images, a folder `trn`,
      `tst` or `lbl` of image files `ROW_SLOT.EXT` (or `ROW.EXT`, slot 0) or of img2dataset's parquet output, or a file
      `{trn,tst,lbl}_images.parquet`. Or a template of parquet files with `{split}` in the place of trn, tst, lbl.
    builder: the prepared data set.

  Raises:
    InputError: there is nothing of that kind, or its names or columns are not as they must be.
  """
  counts = builder.info.metadata["counts"]
  if not images:
    return {split: _RecordImages(Records(builder, split)) for split in PREFIXES}
  sources = {split: _open(images, split, counts[split]) for split in PREFIXES}
  if not any(source.num_parts for source in sources.values()):
    raise InputError(
      f"--images={images}: no images there; name a folder with trn, tst or lbl (image files or parquet) "
      "or trn_images.parquet ..., or a template such as DIR/{split}/*.parquet"
    )
  return sources


def _open(images: str, split: str, num_rows: int) -> ImageSource:
  if "{split}" in images:
    return _ParquetImages(sorted(map(Path, glob.glob(images.replace("{split}", PREFIXES[split])))), num_rows)
  folder = Path(images) / PREFIXES[split]
  if not folder.is_dir():
    single = Path(images) / raw.SPLITS[split].images
    return _ParquetImages([single] if single.is_file() else [], num_rows)
  parquet = sorted(folder.glob("*.parquet"))
  return _ParquetImages(parquet, num_rows) if parquet else _FileImages(folder, num_rows)


class _RecordImages:
  """The images inside a prepared data set."""

  def __init__(self, records: Records):
    self._records = records
    self.num_parts = -(-len(records) // PART_ROWS)
    self.identity = "dataset"  # Whose raw files are hashed.

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    for part in parts:
      end = min((part + 1) * PART_ROWS, len(self._records))
      for start in range(part * PART_ROWS, end, _CHUNK):
        rows = range(start, min(start + _CHUNK, end))
        yield (
          part,
          [
            EncodedImage(row, slot, blob)
            for row, record in zip(rows, self._records.take(rows), strict=True)
            for slot, blob in record.images()
          ],
        )


class _FileImages:
  """A folder of image files."""

  def __init__(self, folder: Path, num_rows: int):
    self._folder = folder
    self._files: list[tuple[int, int, str]] = []
    sizes = []
    with os.scandir(folder) as entries:
      for entry in entries:
        if not entry.name.startswith("."):  # .DS_Store and the like.
          self._files.append(_row_and_slot(folder, entry.name, num_rows))
          sizes.append([entry.name, entry.stat().st_size])
    self._files.sort()
    self.num_parts = -(-len(self._files) // PART_IMAGES)
    self.identity = sorted(sizes)

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    for part in parts:
      files = self._files[part * PART_IMAGES : (part + 1) * PART_IMAGES]
      yield part, [EncodedImage(row, slot, self._folder / name) for row, slot, name in files]


class _ParquetImages:
  """Parquet files, read one after the other; a part is a run of records."""

  def __init__(self, paths: list[Path], num_rows: int):
    self._paths, self._num_rows = paths, num_rows
    self._columns = [_columns(path) for path in paths]
    lengths = [_open_parquet(path).metadata.num_rows for path in paths]
    self._starts = offsets_of(lengths)
    self.num_parts = -(-int(self._starts[-1]) // PART_IMAGES)
    self.identity = [[path.name, path.stat().st_size] for path in paths]

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    wanted = set(parts)
    for path, columns, start in zip(self._paths, self._columns, self._starts, strict=False):
      try:
        yield from self._read_file(path, columns, int(start), wanted)
      except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error

  def _read_file(
    self, path: Path, columns: list[str], start: int, wanted: set[int]
  ) -> Iterator[tuple[int, list[EncodedImage]]]:
    with _open_parquet(path) as file:
      position = start
      for group in range(file.metadata.num_row_groups):
        end = position + file.metadata.row_group(group).num_rows
        if not wanted.isdisjoint(range(position // PART_IMAGES, -(-end // PART_IMAGES))):
          yield from self._read_group(path, file, group, columns, (position, start), wanted)
        position = end

  def _read_group(
    self, path: Path, file: pq.ParquetFile, group: int, columns: list[str], where: tuple[int, int], wanted: set[int]
  ) -> Iterator[tuple[int, list[EncodedImage]]]:
    position, start = where
    for batch in file.iter_batches(_CHUNK, row_groups=[group], columns=columns):
      while len(batch):
        part = position // PART_IMAGES
        taken = batch.slice(0, (part + 1) * PART_IMAGES - position)
        if part in wanted:
          yield part, self._images(path, position - start, taken, columns)
        position, batch = position + len(taken), batch.slice(len(taken))

  def _images(self, path: Path, record: int, batch: pa.RecordBatch, columns: list[str]) -> list[EncodedImage]:
    rows, slots, blobs = (batch.column(name) for name in columns)
    try:
      rows, slots = (values.cast(pa.int64()).to_pylist() for values in (rows, slots))
    except pa.ArrowInvalid as error:
      raise InputError(f"{path}: near record {record}: row and slot must be whole numbers ({error})") from error
    for row, slot in zip(rows, slots, strict=True):
      if row is None or not 0 <= row < self._num_rows or slot is None or not 0 <= slot <= _MAX_SLOT:
        raise InputError(
          f"{path}: record {record}: row {row}, slot {slot} is out of range, the split has rows 0 to "
          f"{self._num_rows - 1}"
        )
      record += 1
    return list(map(EncodedImage, rows, slots, blobs.to_pylist()))


def _row_and_slot(folder: Path, name: str, num_rows: int) -> tuple[int, int, str]:
  match = _FILE_NAME.fullmatch(name)
  if not match:
    raise InputError(
      f"{folder / name}: image files must be called ROW_SLOT.EXT or ROW.EXT, such as 17_0.jpg; rename "
      "it or take it out of the folder"
    )
  row, slot = int(match[1]), int(match[2] or 0)
  if row >= num_rows or slot > _MAX_SLOT:
    raise InputError(f"{folder / name}: row {row}, slot {slot} is out of range, the split has rows 0 to {num_rows - 1}")
  return row, slot, name


def _open_parquet(path: Path) -> pq.ParquetFile:
  try:
    # By default a row group's images are read into memory as a whole.
    return pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
  except (pa.ArrowException, OSError) as error:
    raise _unreadable(path, error) from error


def _columns(path: Path) -> list[str]:
  """Names of the columns of row, slot and bytes."""
  with _open_parquet(path) as file:
    schema = file.schema_arrow
  blob = next((name for name in _COLUMNS if name in schema.names), None)
  if blob is None or not {"row", "slot"} <= set(schema.names):
    raise InputError(
      f"{path}: columns must be row, slot and one of {', '.join(_COLUMNS)}; found "
      f"{', '.join(schema.names)} (img2dataset: --output_format parquet, and keep row and slot with "
      "--save_additional_columns)"
    )
  if not (pa.types.is_binary(schema.field(blob).type) or pa.types.is_large_binary(schema.field(blob).type)):
    raise InputError(f"{path}: column {blob} holds {schema.field(blob).type}; it must hold the encoded images (binary)")
  return ["row", "slot", blob]


def _unreadable(path: Path, error: Exception) -> InputError:
  return InputError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy or write it again")
