"""Sources of encoded images: the prepared data set, folders of files, or parquet files (those of img2dataset as well).

A source gives the images of one split in parts of at most a few thousand, in any order of rows. Each part can be
processed and kept on its own.
"""

from collections.abc import Iterator, Sequence
import glob
import os
from pathlib import Path
import re
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from vixml_jax.datasets.raw import SPLITS
from vixml_jax.datasets.raw_images import MAX_SLOT, out_of_range
from vixml_jax.datasets.records import Records
from vixml_jax.datasets.uids import hash_of_uid
from vixml_jax.errors import InputError, listed
from vixml_jax.parquet_files import check_num_rows, open_parquet, read_errors, row_batches
from vixml_jax.ragged import offsets_of

IMAGES_PER_PART = 2048
"""Number of images in a part of a folder or of parquet files."""
ROWS_PER_PART = 1024
"""Number of rows in a part of a prepared data set, whose number of images is known only when they are read."""
PER_READ = 256
"""Number of rows or images that are read at a time."""

PREFIXES = {"train": "trn", "test": "tst", "labels": "lbl"}
"""Prefix of the names of files and folders of each split."""

_COLUMNS = ("png", "jpg", "jpeg", "webp", "image", "bytes")
_FILE_NAME = re.compile(r"(\d+)(?:_(\d+))?\.\w+")


class EncodedImage(NamedTuple):
  """An encoded image and the row and slot to which it belongs.

  Attributes:
    row: Row of the split.
    slot: Position of the image among those of its row.
    blob: The encoded bytes, the path of a file with them, or None for a missing image.
  """

  row: int
  slot: int
  blob: bytes | Path | None


class ImageSource(Protocol):
  """The images of one split.

  Attributes:
    num_parts: Number of parts.
    identity: JSON value that changes with the contents of the source.
  """

  num_parts: int
  identity: Any

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    """Yields the number and the images of parts, given in ascending order; a part may come in several pieces."""


def open_sources(images: str, builder: tfds.core.DatasetBuilder) -> dict[str, ImageSource]:
  """Opens the images of `train`, `test` and `labels`.

  Args:
    images: "" for the images in the prepared data set. Or a folder that has, for each split with images, a folder
      `trn`, `tst` or `lbl` with image files `ROW_SLOT.EXT` (or `ROW.EXT`, slot 0) or with parquet files of
      img2dataset, or a file `{trn,tst,lbl}_images.parquet`. Or a template of paths of parquet files, in which
      `{split}` stands for trn, tst or lbl. Or parquet files for all splits (a folder that has nothing but those, a file
      or a pattern), whose column `id` has the uids of the items.
    builder: Prepared data set.

  Returns:
    A source for each split.

  Raises:
    InputError: There are no such images, or names of files or columns are not as described.
  """
  counts = builder.info.metadata["counts"]
  if not images:
    return {split: _RecordImages(Records(builder, split)) for split in PREFIXES}
  paths = _paths_by_id(images)
  if paths:
    ids = _ImageIds(paths)
    by_id = {split: _ImagesById(paths, ids, Records(builder, split)) for split in PREFIXES}
    if not any(source.num_images for source in by_id.values()):
      raise InputError(f"--images={images}: no id in these files is a uid of {builder.name}; check column id")
    return dict(by_id)
  sources = {split: _open(images, split, counts[split]) for split in PREFIXES}
  if not any(source.num_parts for source in sources.values()):
    raise InputError(
      f"--images={images}: no images found; give a folder with trn, tst or lbl (image files or parquet) or "
      "trn_images.parquet ..., a template such as DIR/{split}/*.parquet, or parquet files with a column id"
    )
  return sources


def _paths_by_id(images: str) -> list[Path]:
  """Returns the parquet files for all splits; empty if the images are given split by split."""
  if "{split}" in images:
    return []
  folder = Path(images)
  if not folder.is_dir():
    return sorted(map(Path, glob.glob(images)))  # noqa: PTH207, Path.glob takes no absolute pattern.
  split_by_split = [*PREFIXES.values(), *(files.images for files in SPLITS.values())]
  return [] if any((folder / name).exists() for name in split_by_split) else sorted(folder.glob("*.parquet"))


def _open(images: str, split: str, num_rows: int) -> ImageSource:
  if "{split}" in images:
    names = glob.glob(images.replace("{split}", PREFIXES[split]))  # noqa: PTH207, Path.glob takes no absolute pattern.
    return _ParquetImages(sorted(map(Path, names)), num_rows)
  folder = Path(images) / PREFIXES[split]
  if not folder.is_dir():
    single = Path(images) / SPLITS[split].images
    return _ParquetImages([single] if single.is_file() else [], num_rows)
  parquet = sorted(folder.glob("*.parquet"))
  return _ParquetImages(parquet, num_rows) if parquet else _FileImages(folder, num_rows)


class _RecordImages:
  """The images in a prepared data set."""

  def __init__(self, records: Records):
    self._records = records
    self.num_parts = -(-len(records) // ROWS_PER_PART)
    self.identity: Any = "dataset"  # Its raw files are hashed elsewhere.

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    for part in parts:
      end = min((part + 1) * ROWS_PER_PART, len(self._records))
      for start in range(part * ROWS_PER_PART, end, PER_READ):
        rows = range(start, min(start + PER_READ, end))
        images = [
          EncodedImage(row, slot, blob)
          for row, record in zip(rows, self._records.take(rows), strict=True)
          for slot, blob in record.images()
        ]
        yield part, images


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
    self.num_parts = -(-len(self._files) // IMAGES_PER_PART)
    self.identity: Any = sorted(sizes)

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    for part in parts:
      files = self._files[part * IMAGES_PER_PART : (part + 1) * IMAGES_PER_PART]
      yield part, [EncodedImage(row, slot, self._folder / name) for row, slot, name in files]


class _ParquetImages:
  """Parquet files, read one after the other. A part is a range of their records."""

  def __init__(self, paths: list[Path], num_rows: int):
    self._paths, self._num_rows = paths, num_rows
    self._columns = [self._columns_of(path) for path in paths]
    self._starts = offsets_of([_num_records(path) for path in paths])
    self.num_parts = -(-int(self._starts[-1]) // IMAGES_PER_PART)
    self.identity: Any = [[path.name, path.stat().st_size] for path in paths]

  def read(self, parts: Sequence[int]) -> Iterator[tuple[int, list[EncodedImage]]]:
    wanted = set(parts)
    for path, columns, start in zip(self._paths, self._columns, self._starts, strict=False):
      yield from self._read_file(path, columns, int(start), wanted)

  def _read_file(
    self, path: Path, columns: list[str], start: int, wanted: set[int]
  ) -> Iterator[tuple[int, list[EncodedImage]]]:
    """Yields the wanted images of a file whose first record is record `start` of the source."""
    with read_errors(path), open_parquet(path) as file:
      position = start
      for group in range(file.metadata.num_row_groups):
        end = position + file.metadata.row_group(group).num_rows
        if not wanted.isdisjoint(range(position // IMAGES_PER_PART, -(-end // IMAGES_PER_PART))):
          yield from self._read_group(path, file, group, columns, (position, start), wanted)
        position = end

  def _read_group(
    self, path: Path, file: pq.ParquetFile, group: int, columns: list[str], where: tuple[int, int], wanted: set[int]
  ) -> Iterator[tuple[int, list[EncodedImage]]]:
    """Yields the wanted images of a row group; `where` are the first records of the group and of its file."""
    position, start = where
    for batch in row_batches(file, PER_READ, columns, group):
      while len(batch):
        part = position // IMAGES_PER_PART
        taken = batch.slice(0, (part + 1) * IMAGES_PER_PART - position)
        if part in wanted:
          yield part, self._images(path, position - start, taken, columns)
        position, batch = position + len(taken), batch.slice(len(taken))

  def _columns_of(self, path: Path) -> list[str]:
    """Returns the names of the columns to read."""
    return ["row", "slot", _blob_column(path, ("row", "slot"))]

  def _images(self, path: Path, record: int, batch: pa.RecordBatch, columns: list[str]) -> list[EncodedImage]:
    """Returns the images of a batch whose first record is record `record` of its file."""
    rows, slots, blobs = (batch.column(name) for name in columns)
    try:
      rows, slots = (values.cast(pa.int64()).to_pylist() for values in (rows, slots))
    except pa.ArrowInvalid as error:
      raise InputError(
        f"{path}: near record {record}: row and slot must be integers ({str(error).splitlines()[0]})"
      ) from error
    for row, slot in zip(rows, slots, strict=True):
      if row is None or not 0 <= row < self._num_rows or slot is None or not 0 <= slot <= MAX_SLOT:
        raise InputError(f"{path}: record {record}: {out_of_range(row, slot, self._num_rows)}")
      record += 1
    return list(map(EncodedImage, rows, slots, blobs.to_pylist()))


class _ImageIds:
  """The id and the slot of every record of parquet files.

  The slot of an image is its place among the images with its id: in the order of the files and, within one, of the
  column `key`, if there is one. img2dataset writes images as they arrive, and `key` numbers them as they were listed.

  Attributes:
    hashes: Hash of the id of each record, int64 [R].
    slots: Slot of each record, int32 [R].
  """

  def __init__(self, paths: list[Path]):
    hashes, places = [], []
    for path in paths:
      _blob_column(path, ("id",))
      with read_errors(path), open_parquet(path) as file:
        names = [name for name in ("id", "key") if name in file.schema_arrow.names]
        table = file.read(columns=names)
        for column in table.columns:
          check_num_rows(len(column), file.metadata.num_rows)
      if table.column("id").null_count:
        raise InputError(f"{path}: column id has {table.column('id').null_count} records without an id")
      hashes.append(np.array([hash_of_uid(str(uid)) for uid in table.column("id").to_pylist()], np.int64))
      ordered = "key" in names and not table.column("key").null_count
      ranks = pc.rank(table.column("key"), tiebreaker="first").to_numpy() if ordered else np.arange(len(table))
      places.append(ranks.astype(np.int64))
    files = np.repeat(np.arange(len(paths)), [len(part) for part in hashes])
    self.hashes = np.concatenate(hashes)
    order = np.lexsort((np.concatenate(places), files, self.hashes))
    starts = np.searchsorted(self.hashes[order], self.hashes[order])
    self.slots = np.empty(len(order), np.int32)
    self.slots[order] = np.arange(len(order)) - starts


class _ImagesById(_ParquetImages):
  """Parquet files for all splits: the images whose id is the uid of a row of one split.

  Attributes:
    num_images: Number of images of the split.
  """

  def __init__(self, paths: list[Path], ids: _ImageIds, records: Records):
    super().__init__(paths, len(records))
    uids = np.array([hash_of_uid(record.text(["uid"])) for batch in records.batches() for record in batch], np.int64)
    self._order = np.argsort(uids, kind="stable")
    # The rows of record i of the files are _order[_first[i] : _end[i]]: a split may have a uid more than once.
    self._first, self._end = (np.searchsorted(uids[self._order], ids.hashes, side) for side in ("left", "right"))
    self._slots, self._starts_of = ids.slots, dict(zip(paths, self._starts.tolist(), strict=False))
    self.num_images = int((self._end - self._first).sum())

  def _columns_of(self, path: Path) -> list[str]:
    return [_blob_column(path, ("id",))]

  def _images(self, path: Path, record: int, batch: pa.RecordBatch, columns: list[str]) -> list[EncodedImage]:
    start = self._starts_of[path] + record
    return [
      EncodedImage(int(row), int(self._slots[start + i]), blob)
      for i, blob in enumerate(batch.column(columns[0]).to_pylist())
      for row in self._order[self._first[start + i] : self._end[start + i]]
    ]


def _row_and_slot(folder: Path, name: str, num_rows: int) -> tuple[int, int, str]:
  """Returns row, slot and name of an image file."""
  match = _FILE_NAME.fullmatch(name)
  if not match:
    raise InputError(
      f"{folder / name}: the name of an image file must be ROW_SLOT.EXT or ROW.EXT, such as 17_0.jpg; rename the file "
      "or remove it"
    )
  row, slot = int(match[1]), int(match[2] or 0)
  if row >= num_rows or slot > MAX_SLOT:
    raise InputError(f"{folder / name}: {out_of_range(row, slot, num_rows)}")
  return row, slot, name


def _num_records(path: Path) -> int:
  with read_errors(path), open_parquet(path) as file:
    num_records = file.metadata.num_rows
  return num_records


def _blob_column(path: Path, required: tuple[str, ...]) -> str:
  """Returns the name of the column of encoded images of a parquet file that must also have the required columns."""
  with read_errors(path), open_parquet(path) as file:
    schema = file.schema_arrow
  names, wanted = schema.names, " and ".join(required)
  blob = next((name for name in _COLUMNS if name in names), None)
  if blob is None and "url" in names:
    raise InputError(
      f"{path}: has URLs and no images; download them with img2dataset (docs/images.md), keeping {wanted} with "
      "--save_additional_columns, and set --images to its output"
    )
  if blob is None or not set(required) <= set(names):
    raise InputError(
      f"{path}: columns must be {', '.join(required)} and one of {', '.join(_COLUMNS)}; found {listed(names)} "
      f"(img2dataset: --output_format parquet, and keep {wanted} with --save_additional_columns)"
    )
  if not (pa.types.is_binary(schema.field(blob).type) or pa.types.is_large_binary(schema.field(blob).type)):
    raise InputError(
      f"{path}: column {blob} has type {schema.field(blob).type}; it must have the encoded images (binary)"
    )
  return blob
