"""Writes the rows of a table as the files of a raw folder."""

from collections.abc import Sequence
import contextlib
import gzip
import json
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vixml_jax.datasets.raw import SPLITS
from vixml_jax.datasets.uids import hash_of_uid
from vixml_jax.stages import stage
from vixml_jax.tables.cells import images_of, text_of, uid_of
from vixml_jax.tables.columns import Columns
from vixml_jax.tables.label_names import Labels, optional_text
from vixml_jax.tables.parts import Part, RowBatch
from vixml_jax.tables.reading import ROWS_AT_ONCE, FirstReading, cell_errors, checked
from vixml_jax.tables.sources import SourcePart

IMAGE_FILES = "image_files.jsonl"
"""Path, size and time of change of each file of an image that was read."""

_IMAGES_AT_ONCE = 256
_SCHEMA = pa.schema([("row", pa.int32()), ("slot", pa.int32()), ("png", pa.binary())])
_COMPRESSION = 4  # Of gzip: as fast as 1 on texts, and a tenth smaller.


class SplitWriter:
  """Writes the rows and the images of one split.

  Attributes:
    count: Number of rows so far.
    images: Number of images so far.
  """

  def __init__(self, folder: Path, split: str, image_files: IO[str] | None):
    """Opens the files in a folder; `image_files` receives the files of images, and is None for rows without images."""
    self.count = self.images = 0
    self._image_files = image_files
    self._stack = contextlib.ExitStack()
    packed = self._stack.enter_context((folder / SPLITS[split].rows).open("wb"))
    # Without a time, so that the same table makes the same bytes.
    self._rows = self._stack.enter_context(gzip.GzipFile("", "wb", _COMPRESSION, cast(Any, packed), mtime=0))
    self._parquet = None
    if image_files is not None:
      self._parquet = self._stack.enter_context(pq.ParquetWriter(folder / SPLITS[split].images, _SCHEMA))
    self._pending: list[dict[str, Any]] = []

  def __enter__(self) -> "SplitWriter":
    return self

  def __exit__(self, *error: object) -> None:
    with self._stack:
      self._flush()

  def add(self, record: dict[str, Any], images: Sequence[tuple[bytes, Path | None]]) -> None:
    """Writes a row and its images."""
    self._rows.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    for slot, (blob, path) in enumerate(images):
      self._pending.append({"row": self.count, "slot": slot, "png": blob})
      if path is not None and self._image_files is not None:
        self._image_files.write(json.dumps(file_state(path)) + "\n")
    self.count += 1
    self.images += len(images)
    if len(self._pending) >= _IMAGES_AT_ONCE:
      self._flush()

  def _flush(self) -> None:
    if self._parquet is not None and self._pending:
      self._parquet.write_table(pa.Table.from_pylist(self._pending, _SCHEMA))
      self._pending = []


def file_state(path: Path) -> list[Any]:
  """Returns path, size and time of change of a file; the last two are None if it cannot be read."""
  try:
    state = path.stat()
  except OSError:
    return [str(path.absolute()), None, None]
  return [str(path.absolute()), state.st_size, state.st_mtime_ns]


def write_queries(
  folder: Path, sources: Sequence[SourcePart], columns: Columns, first: FirstReading, labels: Labels, files: IO[str]
) -> dict[str, dict[str, int]]:
  """Writes `trn.json.gz`, `tst.json.gz` and their images.

  Args:
    folder: Folder to write to.
    sources: Parts of the table.
    columns: Its columns.
    first: What the first reading found.
    labels: The labels; names that are new are added, if there is no table of labels.
    files: Receives the files of images.

  Returns:
    The number of rows and images of both splits.

  Raises:
    InputError: Labels, relevance, content or an image of a row cannot be used.
  """
  image_files = files if columns.images else None
  start, is_test = 0, first.is_test.tolist()
  with (
    SplitWriter(folder, "train", image_files) as train,
    SplitWriter(folder, "test", image_files) as test,
    stage("write the raw folder", total=len(is_test), unit="row", logged=False) as progress,
  ):
    for source in sources:
      for batch in source.part.batches(columns.chosen(), _IMAGES_AT_ONCE if columns.images else ROWS_AT_ONCE):
        written = _write_batch(source.part, batch, columns, first, labels, (train, test), is_test, start)
        start += written
        progress.advance(written)
  return {name: {"rows": writer.count, "images": writer.images} for name, writer in (("train", train), ("test", test))}


def _write_batch(
  part: Part,
  batch: RowBatch,
  columns: Columns,
  first: FirstReading,
  labels: Labels,
  writers: tuple[SplitWriter, SplitWriter],
  is_test: list[bool],
  start: int,
) -> int:
  """Writes the rows of a batch, of which the first is row `start` of the table, and returns their number."""
  texts = checked(batch, columns.text, text_of)
  contents = checked(batch, columns.content, optional_text) if columns.content else [""] * len(texts)
  uids = checked(batch, columns.uid, uid_of) if columns.uid else [f"row/{start + row}" for row in range(len(texts))]
  targets = checked(batch, columns.labels, lambda value: labels.find(first.labels.names(value)))
  for row, (uid, title, content, ids) in enumerate(zip(uids, texts, contents, targets, strict=True)):
    relevance, images = [1.0] * len(ids), []
    if columns.relevance:
      with cell_errors(batch, row, columns.relevance):
        relevance = first.labels.numbers(batch.columns[columns.relevance][row], len(ids))
    if columns.images:
      with cell_errors(batch, row, columns.images):
        images = images_of(batch.columns[columns.images][row], part.folder)
    record = {"uid": uid, "title": title, "content": content, "target_ind": ids, "target_rel": relevance}
    writers[is_test[start + row]].add(record, images)
  return len(texts)


def write_labels(folder: Path, labels: Labels, files: IO[str]) -> dict[str, int]:
  """Writes `lbl.json.gz` and the images of labels, and returns their numbers."""
  with SplitWriter(folder, "labels", files if labels.images else None) as writer:
    for label in labels.rows():
      images: list[tuple[bytes, Path | None]] = []
      if labels.images and label.batch is not None and label.part is not None:
        with cell_errors(label.batch, label.row, labels.images):
          images = images_of(label.batch.columns[labels.images][label.row], label.part.folder)
      writer.add({"uid": label.uid, "title": label.title, "content": label.content}, images)
  return {"rows": writer.count, "images": writer.images}


def own_labels(uids: np.ndarray, labels: Labels) -> int:
  """Returns how many queries have the uid of a label."""
  hashes = np.fromiter(map(hash_of_uid, labels.ids), np.int64, len(labels.ids))
  return int(np.isin(uids, hashes).sum())
