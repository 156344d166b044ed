"""Streams the raw format of the Extreme Classification Repository and says what is wrong with it.

A folder holds `trn.json.gz`, `tst.json.gz` and `lbl.json.gz` (one JSON object a line with `uid`,
`title`, `content` and, except for labels, `target_ind`, `target_rel`), `filter_labels_train.txt`
and `filter_labels_test.txt` (lines `row label`: pairs to take out before scoring) and, if there are
images, `{trn,tst,lbl}_images.parquet` with columns `row, slot, png`. Line `i` of a file is row
`i - 1`; the row of a label is its id.

What makes a row unusable raises `InputError` with file and line. What published sets are known to
contain (empty titles, rows without labels, ...) is taken and counted in `DataWarnings`.
"""

import array
from collections.abc import Iterator
import dataclasses
import gzip
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from vixml_jax.errors import InputError
from vixml_jax.files import sha256_of_file
from vixml_jax.ragged import Ragged

_CHUNK_BYTES = 1 << 20
_IMAGES_A_READ = 256
_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
_MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class SplitFiles:
  """Names of the raw files of one split; `filter` is None for the labels."""

  rows: str
  images: str
  filter: str | None


SPLITS = {
  "train": SplitFiles("trn.json.gz", "trn_images.parquet", "filter_labels_train.txt"),
  "test": SplitFiles("tst.json.gz", "tst_images.parquet", "filter_labels_test.txt"),
  "labels": SplitFiles("lbl.json.gz", "lbl_images.parquet", None),
}


class DataWarnings:
  """Counts what is unusual in a data set but known to occur, so that each kind is told once."""

  def __init__(self):
    self._seen: dict[tuple[str, str], list[int]] = {}

  def add(self, path: Path, line: int, what: str) -> None:
    """Counts `what` for `line` of `path`; the first line of each kind is remembered."""
    self._seen.setdefault((str(path), what), [0, line])[0] += 1

  def messages(self) -> list[str]:
    """One line for each kind, with the number of rows and the first line number."""
    return [
      f"{path}: {count} {'row' if count == 1 else 'rows'} with {what}, first at line {first}"
      for (path, what), (count, first) in self._seen.items()
    ]

  def report(self) -> None:
    """Logs each kind once as a warning and forgets it."""
    for message in self.messages():
      logging.getLogger(__name__).warning(message)
    self._seen.clear()


def check_folder(folder: Path) -> None:
  """Raises InputError unless `folder` exists and holds every file that the format requires."""
  if not folder.is_dir():
    raise InputError(
      f"{folder}: no such folder; set --config.dataset.raw_dir to the folder that holds "
      f"{', '.join(files.rows for files in SPLITS.values())}"
    )
  for files in SPLITS.values():
    if not (folder / files.rows).is_file():
      raise InputError(
        f"{folder / files.rows}: missing; the folder must hold "
        f"{', '.join(f.rows for f in SPLITS.values())}, one JSON object a line"
      )
  for files in SPLITS.values():
    if files.filter and not (folder / files.filter).is_file():
      raise InputError(
        f"{folder / files.filter}: missing; it lists the pairs 'row label' to take "
        "out before scoring: make an empty file if there are none"
      )


def present_files(folder: Path) -> list[Path]:
  """The files of the raw format that `folder` holds, in a fixed order."""
  names = [name for files in SPLITS.values() for name in (files.rows, files.images, files.filter)]
  return [folder / name for name in names if name and (folder / name).is_file()]


def sha256_of_files(folder: Path) -> dict[str, str]:
  """File name -> sha256 in hex of every raw file, read in chunks."""
  paths = present_files(folder)
  total = sum(path.stat().st_size for path in paths)
  digests = {}
  with tqdm(total=total, unit="B", unit_scale=True, desc="hash raw files", disable=None) as bar:
    for path in paths:
      digests[path.name] = sha256_of_file(path, bar.update)
  return digests


def count_rows(path: Path) -> int:
  """Number of lines of a gzip file; the last one may lack its newline.

  Raises:
    InputError: the file is no gzip file, or is truncated or damaged.
  """
  rows, last = 0, b"\n"
  try:
    with gzip.open(path, "rb") as file:
      # Unlike read, read1 gives what precedes a truncation, so that the line can be named.
      while chunk := file.read1(_CHUNK_BYTES):
        rows += chunk.count(b"\n")
        last = chunk[-1:]
  except (EOFError, OSError, zlib.error) as error:
    raise _damaged(path, rows + 1, error) from error
  return rows + (last != b"\n")


def read_queries(path: Path, num_labels: int, data_warnings: DataWarnings) -> Iterator[dict]:
  """Yields `uid, title, content` (text), `target_ind` (int32) and `target_rel` (float32) by row.

  Args:
    path: `trn.json.gz` or `tst.json.gz`.
    num_labels: L; every target must lie in `0 .. L - 1`.
    data_warnings: counts rows without labels, repeated targets and what `read_labels` counts.

  Raises:
    InputError: names file and line.
  """
  for line, record in _records(path):
    row = _text_fields(path, line, record, data_warnings)
    row["target_ind"], row["target_rel"] = _targets(path, line, record, num_labels, data_warnings)
    yield row


def read_labels(path: Path, data_warnings: DataWarnings) -> Iterator[dict]:
  """Yields `uid, title, content` (text) of every label; its row is its id.

  Args:
    path: `lbl.json.gz`.
    data_warnings: counts empty titles, absent `content` and repaired text.

  Raises:
    InputError: names file and line; also when two labels have the same uid.
  """
  hashes = array.array("q")
  for line, record in _records(path):
    row = _text_fields(path, line, record, data_warnings)
    digest = hashlib.blake2b(row["uid"].encode(), digest_size=8).digest()
    hashes.append(int.from_bytes(digest, "little", signed=True))
    yield row
  _check_unique(path, np.frombuffer(hashes, np.int64))


def read_filter(path: Path, num_rows: int, num_labels: int) -> Ragged:
  """Reads a filter file: row i of the result holds the ascending labels to take out for query i.

  Args:
    path: lines `row label`; blank lines are skipped, repeated pairs count once, order is free.
    num_rows: N of the split.
    num_labels: L.

  Returns:
    Ragged of N rows with int32 label ids.

  Raises:
    InputError: names file and line.
  """
  pairs = array.array("q")
  with path.open("rb") as file:
    for line, text in enumerate(file, 1):
      fields = text.split()
      if not fields:
        continue
      if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit():
        raise InputError(
          f"{path}:{line}: expected 'row label', two whole numbers, but found {_excerpt(text)}; mend or delete the line"
        )
      row, label = int(fields[0]), int(fields[1])
      if row >= num_rows:
        raise InputError(
          f"{path}:{line}: row {row} is out of range, the split has rows 0 to "
          f"{num_rows - 1}; does this file belong to this split?"
        )
      if label >= num_labels:
        raise InputError(
          f"{path}:{line}: label {label} is out of range, there are labels 0 to "
          f"{num_labels - 1}; does this file belong to this data set?"
        )
      pairs.append(row * num_labels + label)
  unique = np.unique(np.frombuffer(pairs, np.int64))
  counts = np.bincount(unique // num_labels, minlength=num_rows)
  return Ragged.of_lengths((unique % num_labels).astype(np.int32), counts)


def read_images(path: Path, num_rows: int) -> Iterator[tuple[list[int], list[bytes]]]:
  """Yields for each of the `num_rows` rows its image slots and the encoded images, as stored.

  Args:
    path: parquet file with integer columns `row` and `slot` and a binary column `png` (or `image`
      for other encodings), sorted by row, slot. A missing file means no images.
    num_rows: rows of the split; rows without images yield empty lists.

  Raises:
    InputError: names the file and the 0-based record at fault.
  """
  images = _image_records(path, num_rows) if path.is_file() else iter(())
  pending = next(images, None)
  for row in range(num_rows):
    slots, blobs = [], []
    while pending is not None and pending[0] == row:
      slots.append(pending[1])
      blobs.append(pending[2])
      pending = next(images, None)
    yield slots, blobs


def _records(path: Path) -> Iterator[tuple[int, dict]]:
  """Line number and JSON object of every line."""
  line = 0
  try:
    with gzip.open(path, "rb") as file:
      for line, raw in enumerate(file, 1):
        yield line, _parse(path, line, raw)
  except (EOFError, OSError, zlib.error) as error:
    raise _damaged(path, line + 1, error) from error


def _parse(path: Path, line: int, raw: bytes) -> dict:
  try:
    # Editors on Windows put a byte order mark in front of the first line.
    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x} at column "
      f"{error.start + 1}); convert the file, e.g. with iconv -t UTF-8"
    ) from error
  if not text.strip():
    raise InputError(f"{path}:{line}: empty line; delete it, each line is one row")
  try:
    record = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    reason = "nested too deep"
    if isinstance(error, json.JSONDecodeError):
      reason = f"{error.msg} at column {error.colno}"
    raise InputError(f"{path}:{line}: malformed JSON, {reason}; each line must be one JSON object") from error
  if not isinstance(record, dict):
    raise InputError(f"{path}:{line}: expected a JSON object with uid, title, ... but found {_excerpt(raw)}")
  return record


def _damaged(path: Path, line: int, error: Exception) -> InputError:
  if isinstance(error, gzip.BadGzipFile) and line == 1:
    return InputError(f"{path}:1: not a gzip file ({error}); compress it with gzip")
  if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile)):
    return InputError(f"{path}:{line}: the gzip file is truncated or damaged ({error}); download or copy it again")
  return InputError(f"{path}:{line}: cannot be read ({error})")


def _text_fields(path: Path, line: int, record: dict, data_warnings: DataWarnings) -> dict:
  uid = _required(path, line, record, "uid")
  if type(uid) not in (str, int):
    raise InputError(f"{path}:{line}: key 'uid' must be text or a whole number, found {_excerpt(uid)}")
  title = _required(path, line, record, "title")
  if "content" not in record:
    data_warnings.add(path, line, "no key 'content' (taken as empty)")
  content = record.get("content", "")
  for key, value in (("title", title), ("content", content)):
    if not isinstance(value, str):
      raise InputError(f"{path}:{line}: key '{key}' must be text, found {_excerpt(value)}")
  if not title.strip():
    data_warnings.add(path, line, "an empty title")
  texts = {"uid": str(uid), "title": title, "content": content}
  return {key: _encodable(path, line, text, data_warnings) for key, text in texts.items()}


def _encodable(path: Path, line: int, text: str, data_warnings: DataWarnings) -> str:
  """JSON can spell half of a surrogate pair, which no encoding of text can store."""
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    data_warnings.add(path, line, "half a surrogate pair in its text (replaced)")
    return text.encode(errors="surrogatepass").decode(errors="replace")


def _targets(
  path: Path, line: int, record: dict, num_labels: int, data_warnings: DataWarnings
) -> tuple[np.ndarray, np.ndarray]:
  ids = _list(path, line, record, "target_ind", (int,), "whole numbers")
  relevance = _list(path, line, record, "target_rel", (int, float), "numbers")
  if len(ids) != len(relevance):
    raise InputError(
      f"{path}:{line}: target_ind has {len(ids)} entries and target_rel {len(relevance)}; they must be of one length"
    )
  if not ids:
    data_warnings.add(path, line, "no labels")
  elif min(ids) < 0 or max(ids) >= num_labels:
    label = next(label for label in ids if not 0 <= label < num_labels)
    raise InputError(
      f"{path}:{line}: target_ind names label {label}, but there are labels 0 to "
      f"{num_labels - 1} (0-based lines of {SPLITS['labels'].rows})"
    )
  if not all(map(math.isfinite, relevance)):
    raise InputError(f"{path}:{line}: target_rel holds a number that is not finite")
  if len(set(ids)) < len(ids):
    data_warnings.add(path, line, "repeated labels in target_ind (the first of each is kept)")
    firsts = dict(zip(reversed(ids), reversed(relevance), strict=True))
    ids = list(dict.fromkeys(ids))
    relevance = [firsts[label] for label in ids]
  return np.asarray(ids, np.int32), np.asarray(relevance, np.float32)


def _required(path: Path, line: int, record: dict, key: str) -> Any:
  if key not in record:
    raise InputError(f"{path}:{line}: key '{key}' is missing; found {', '.join(record) or 'none'}")
  return record[key]


def _list(path: Path, line: int, record: dict, key: str, types: tuple, what: str) -> list:
  values = _required(path, line, record, key)
  if not isinstance(values, list):
    raise InputError(f"{path}:{line}: key '{key}' must be a list of {what}, found {_excerpt(values)}")
  if not set(map(type, values)) <= set(types):
    wrong = next(value for value in values if type(value) not in types)
    raise InputError(f"{path}:{line}: key '{key}' must hold {what}, found {_excerpt(wrong)}")
  return values


def _check_unique(path: Path, hashes: np.ndarray) -> None:
  order = np.argsort(hashes, kind="stable")
  same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
  if len(same):
    pair = min(same, key=lambda i: order[i + 1])
    first, second = order[pair] + 1, order[pair + 1] + 1
    raise InputError(
      f"{path}:{second}: the same uid as line {first}; every label may occur once, since its line is its id"
    )


def _image_records(path: Path, num_rows: int) -> Iterator[tuple[int, int, bytes]]:
  """Row, slot and bytes of every image, checked."""
  last, record = (-1, -1), 0
  try:
    # By default a row group's images are read into memory as a whole.
    with pq.ParquetFile(path, buffer_size=_CHUNK_BYTES, pre_buffer=False) as file:
      names = file.schema_arrow.names
      column = next((name for name in ("png", "image") if name in names), None)
      if column is None or not {"row", "slot"} <= set(names):
        raise InputError(f"{path}: columns must be row, slot, png; found {', '.join(names)}")
      wanted = ["row", "slot", column]
      for batch in file.iter_batches(_IMAGES_A_READ, columns=wanted):
        values = (batch.column(name).to_pylist() for name in wanted)  # The file orders them.
        for row, slot, blob in zip(*values, strict=True):
          _check_image(path, record, num_rows, row, slot, blob, last)
          last, record = (row, slot), record + 1
          yield row, slot, blob
  except (pa.ArrowException, OSError) as error:
    raise InputError(
      f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy or write it again"
    ) from error


def _check_image(path: Path, record: int, num_rows: int, row: Any, slot: Any, blob: Any, last: tuple[int, int]) -> None:
  if type(row) is not int or type(slot) is not int or not isinstance(blob, bytes):
    raise InputError(f"{path}: record {record}: row and slot must be whole numbers and the image bytes")
  if not 0 <= row < num_rows or not 0 <= slot <= _MAX_INT32:
    raise InputError(
      f"{path}: record {record}: row {row}, slot {slot} is out of range, the split has rows 0 to {num_rows - 1}"
    )
  if (row, slot) <= last:
    raise InputError(
      f"{path}: record {record}: row {row}, slot {slot} comes after row {last[0]}, "
      f"slot {last[1]}; sort the file by row, slot, each pair once"
    )
  if not blob.startswith(_IMAGE_MAGIC):
    raise InputError(f"{path}: record {record}: row {row}, slot {slot} is no PNG, JPEG, WebP, GIF or BMP image")


def _excerpt(value: Any) -> str:
  """At most 40 characters of what was found, on one line."""
  text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value)
  return repr(text if len(text) <= 40 else text[:37] + "...")
