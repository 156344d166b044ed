"""Reads queries and labels as text, as MM-AmazonTitles-300K is published: lines `uid->title` and a matrix of positives.

The text is in latin-1, as the published code reads it (github DiegoOrtego/vixml, create_tokenized_files.py). The matrix
is in the format of github kunaldahiya/pyxclib: a header `rows columns`, then a line of `label:relevance` per query.
"""

import array
from collections.abc import Iterator
import itertools
from typing import Any
import zipfile
import zlib

import numpy as np

from vixml_jax.datasets.raw import RawFile
from vixml_jax.datasets.raw_records import DataWarnings, check_unique, checked_targets, excerpt
from vixml_jax.datasets.uids import hash_of_uid
from vixml_jax.errors import InputError
from vixml_jax.record_files import bounded_lines

_CHUNK_BYTES = 1 << 20
_UNREADABLE = (EOFError, OSError, zlib.error, zipfile.BadZipFile)


def count_rows(path: RawFile) -> int:
  """Returns the number of lines of a text file. The last line may lack its newline.

  Raises:
    InputError: The file cannot be read.
  """
  rows, last = 0, b"\n"
  try:
    with path.open("rb") as file:
      while chunk := file.read(_CHUNK_BYTES):
        rows += chunk.count(b"\n")
        last = chunk[-1:]
  except _UNREADABLE as error:
    raise _damaged(path, error) from error
  return rows + (last != b"\n")


def read_queries(
  path: RawFile, targets: RawFile, num_rows: int, num_labels: int, data_warnings: DataWarnings
) -> Iterator[dict[str, Any]]:
  """Yields what `raw_records.read_queries` yields; `content` is empty.

  Args:
    path: `train.raw.txt` or `test.raw.txt`.
    targets: `trn_X_Y.txt` or `tst_X_Y.txt`.
    num_rows: N, the number of lines in `path`.
    num_labels: L.
    data_warnings: Counts empty titles, rows without labels, repeated targets and titles that look like UTF-8.

  Raises:
    InputError: A line is not of this form, or the matrix has another shape. The message names the file and the line.
  """
  positives = _matrix_rows(targets, num_rows, num_labels, data_warnings)
  # `positives` checks its number of rows when it ends, so it is asked for one more.
  for row, found in itertools.zip_longest(_text_rows(path, data_warnings), positives):
    row["target_ind"], row["target_rel"] = found
    yield row


def read_labels(path: RawFile, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
  """Yields what `raw_records.read_labels` yields; `content` is empty.

  Args:
    path: `label.raw.txt`.
    data_warnings: Counts empty titles and titles that look like UTF-8.

  Raises:
    InputError: A line is not of this form, or two labels have the same uid. The message names the file and the line.
  """
  hashes = array.array("q")
  for row in _text_rows(path, data_warnings):
    hashes.append(hash_of_uid(row["uid"]))
    yield row
  check_unique(path, np.frombuffer(hashes, np.int64))


def _text_rows(path: RawFile, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
  for line, text in _lines(path):
    uid, arrow, title = text.partition(b"->")
    if not arrow or not uid.strip():
      raise InputError(f"{path}:{line}: expected 'uid->title', but found {excerpt(text)}; correct the line")
    if not title.strip():
      data_warnings.add(path, line, "an empty title")
    if not title.isascii() and _is_utf8(title):
      data_warnings.add(path, line, "a title that looks like UTF-8 (read as latin-1, as the published code does)")
    yield {"uid": uid.strip().decode("latin-1"), "title": title.decode("latin-1"), "content": ""}


def _is_utf8(text: bytes) -> bool:
  try:
    text.decode()
  except UnicodeDecodeError:
    return False
  return True


def _matrix_rows(
  path: RawFile, num_rows: int, num_labels: int, data_warnings: DataWarnings
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields ids and relevance of the positives of every query."""
  lines = _lines(path)
  _, header = next(lines, (1, b""))
  if header.split() != [b"%d" % num_rows, b"%d" % num_labels]:
    raise InputError(
      f"{path}:1: the header must be '{num_rows} {num_labels}', the numbers of queries and labels in *.raw.txt, but is "
      f"{excerpt(header)}; check that the files belong together"
    )
  rows = 0
  for line, text in lines:
    if rows == num_rows:
      raise InputError(f"{path}:{line}: more rows than the {num_rows} of the header; download it again")
    rows += 1
    try:
      pairs = [pair.split(b":") for pair in text.split()]
      ids, relevance = [int(label) for label, _ in pairs], [float(value) for _, value in pairs]
      # Python reads 1_0 as 10, and +0 and -0 as 0. Negative labels are out of range.
      if b"_" in text or not all(label.isdigit() or i < 0 for i, (label, _) in zip(ids, pairs, strict=True)):
        raise ValueError
    except ValueError as error:
      raise InputError(
        f"{path}:{line}: expected 'label:relevance label:relevance ...', but found {excerpt(text)}; correct the line"
      ) from error
    yield checked_targets(path, line, ids, relevance, num_labels, data_warnings, names=("the row", "the row"))
  if rows < num_rows:
    raise InputError(f"{path}:{rows + 2}: the file ends after {rows} of {num_rows} rows; download it again")


def _lines(path: RawFile) -> Iterator[tuple[int, bytes]]:
  """Yields number and content of every line, without its end."""
  try:
    with path.open("rb") as file:
      for line, text in enumerate(bounded_lines(file, path), 1):
        yield line, text.rstrip(b"\r\n")
  except _UNREADABLE as error:
    raise _damaged(path, error) from error


def _damaged(path: RawFile, error: Exception) -> InputError:
  return InputError(f"{path}: cannot be read ({error}); download or copy it again")
