"""Reads queries and labels in JSON, and filter files, row by row; names the file and the line of every mistake."""

import array
from collections.abc import Iterator
import gzip
import json
import logging
from typing import IO, Any, cast
import zipfile
import zlib

import numpy as np

from vixml_jax.datasets.raw import RawFile
from vixml_jax.datasets.uids import hash_of_uid
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.record_files import JSON, bounded_lines, json_fault

_CHUNK_BYTES = 1 << 20
_MAX_DIGITS = 18  # Of an integer in a filter file, so that it fits int64.
_LARGEST = float(np.finfo(np.float32).max)
_UNREADABLE = (EOFError, OSError, zlib.error, zipfile.BadZipFile)


class DataWarnings:
  """Counts of unusual values that published data sets are known to contain, so that each kind is logged once."""

  def __init__(self) -> None:
    self._seen: dict[tuple[str, str], list[int]] = {}

  def add(self, path: RawFile, line: int, what: str) -> None:
    """Counts an unusual value in a line of a file; the first line of each kind is remembered."""
    self._seen.setdefault((str(path), what), [0, line])[0] += 1

  def messages(self) -> list[str]:
    """Returns one line for each kind, with the number of rows and the first line number."""
    return [
      f"{path}: {count} {'row' if count == 1 else 'rows'} with {what}, first at line {first}"
      for (path, what), (count, first) in self._seen.items()
    ]

  def report(self) -> None:
    """Logs each kind as a warning and resets the counts."""
    for message in self.messages():
      logging.getLogger(__name__).warning(message)
    self._seen.clear()


def count_rows(path: RawFile) -> int:
  """Returns the number of lines of a gzip file. The last line may lack its newline.

  Raises:
    InputError: The file is not a gzip file, or is truncated or damaged.
  """
  rows, last = 0, b"\n"
  try:
    with path.open("rb") as packed, gzip.open(packed, "rb") as file:
      # Unlike read, read1 returns the data before a truncation, so that the message can name the line.
      while chunk := file.read1(_CHUNK_BYTES):
        rows += chunk.count(b"\n")
        last = chunk[-1:]
  except _UNREADABLE as error:
    raise _damaged(path, rows + 1, error) from error
  return rows + (last != b"\n")


def read_queries(path: RawFile, num_labels: int, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
  """Yields `uid`, `title`, `content` (str), `target_ind` (int32) and `target_rel` (float32) of every query.

  Args:
    path: `trn.json.gz` or `tst.json.gz`.
    num_labels: L. Targets must be in 0..L-1.
    data_warnings: Counts rows without labels, repeated targets and the kinds of `read_labels`.

  Raises:
    InputError: A line is not of this form. The message names the file and the line.
  """
  for line, record in _records(path):
    row = _text_fields(path, line, record, data_warnings)
    ids = _list(path, line, record, "target_ind", (int,), "integers")
    relevance = _list(path, line, record, "target_rel", (int, float), "numbers")
    row["target_ind"], row["target_rel"] = checked_targets(path, line, ids, relevance, num_labels, data_warnings)
    yield row


def read_labels(path: RawFile, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
  """Yields `uid`, `title` and `content` (str) of every label. The row of a label is its id.

  Args:
    path: `lbl.json.gz`.
    data_warnings: Counts empty titles, missing `content` and repaired text.

  Raises:
    InputError: A line is not of this form, or two labels have the same uid. The message names the file and the line.
  """
  hashes = array.array("q")
  for line, record in _records(path):
    row = _text_fields(path, line, record, data_warnings)
    hashes.append(hash_of_uid(row["uid"]))
    yield row
  check_unique(path, np.frombuffer(hashes, np.int64))


def read_filter(path: RawFile, num_rows: int, num_labels: int) -> Ragged:
  """Reads a filter file: the ids of the labels that are removed before each query is scored.

  Args:
    path: Text file with lines `row label` in any order. Blank lines are skipped, and repeated pairs count once.
    num_rows: N, the number of queries of the split.
    num_labels: L.

  Returns:
    Ascending label ids of each query, N rows of int32.

  Raises:
    InputError: A line is not of this form. The message names the file and the line.
  """
  pairs = array.array("q")
  try:
    with path.open("rb") as file:
      for line, text in enumerate(bounded_lines(file, path), 1):
        if text.strip():
          pairs.append(_filter_pair(path, line, text, num_rows, num_labels))
  except _UNREADABLE as error:
    raise InputError(f"{path}: cannot be read ({error}); download or copy it again") from error
  return filter_rows(np.frombuffer(pairs, np.int64), num_rows, num_labels)


def filter_rows(pairs: np.ndarray, num_rows: int, num_labels: int) -> Ragged:
  """Returns the ascending label ids of each of N queries, N rows of int32, from pairs `row * num_labels + label`.

  Args:
    pairs: int64 [P] in any order, with repetitions.
    num_rows: N.
    num_labels: L.
  """
  unique = np.unique(pairs)
  counts = np.bincount(unique // num_labels, minlength=num_rows)
  return Ragged.of_lengths((unique % num_labels).astype(np.int32), counts)


def _filter_pair(path: RawFile, line: int, text: bytes, num_rows: int, num_labels: int) -> int:
  """Returns `row * num_labels + label` for a line of a filter file."""
  fields = text.split()
  if len(fields) != 2 or not all(field.isdigit() and len(field) <= _MAX_DIGITS for field in fields):
    raise InputError(
      f"{path}:{line}: expected 'row label', two integers, but found {excerpt(text)}; correct or delete the line"
    )
  row, label = int(fields[0]), int(fields[1])
  if row >= num_rows:
    raise InputError(
      f"{path}:{line}: row {row} is out of range, the split has rows 0 to {num_rows - 1}; check that this file "
      "belongs to this split"
    )
  if label >= num_labels:
    raise InputError(
      f"{path}:{line}: label {label} is out of range, labels are 0 to {num_labels - 1}; check that this file "
      "belongs to this data set"
    )
  return row * num_labels + label


def _records(path: RawFile) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line number and JSON object of every line."""
  line = 0
  try:
    with path.open("rb") as packed, gzip.open(packed, "rb") as file:
      for line, raw in enumerate(bounded_lines(cast(IO[bytes], file), path), 1):
        yield line, _parse(path, line, raw)
  except _UNREADABLE as error:
    raise _damaged(path, line + 1, error) from error


def _parse(path: RawFile, line: int, raw: bytes) -> dict[str, Any]:
  try:
    # Editors on Windows write a byte order mark before the first line.
    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
  except UnicodeDecodeError as error:
    raise InputError(
      f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x} at column {error.start + 1}); convert the file, for "
      "example with iconv -t UTF-8"
    ) from error
  if not text.strip():
    raise InputError(f"{path}:{line}: empty line; delete it, since each line is one row")
  try:
    record = JSON.decode(text)
  except (ValueError, RecursionError) as error:
    reason = json_fault(error)
    if isinstance(error, json.JSONDecodeError):
      reason = f"{error.msg} at column {error.colno}"
    raise InputError(f"{path}:{line}: malformed JSON, {reason}; each line must be one JSON object") from error
  if not isinstance(record, dict):
    raise InputError(f"{path}:{line}: expected a JSON object with uid, title, ... but found {excerpt(raw)}")
  return record


def _damaged(path: RawFile, line: int, error: Exception) -> InputError:
  if isinstance(error, gzip.BadGzipFile) and line == 1:
    return InputError(f"{path}:1: not a gzip file ({error}); compress it with gzip")
  if isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)):
    return InputError(f"{path}:{line}: the gzip file is truncated or damaged ({error}); download or copy it again")
  return InputError(f"{path}:{line}: cannot be read ({error}); check its permissions and the disk")


def _text_fields(path: RawFile, line: int, record: dict[str, Any], data_warnings: DataWarnings) -> dict[str, Any]:
  uid = _required(path, line, record, "uid")
  if type(uid) not in (str, int):
    raise InputError(f"{path}:{line}: key 'uid' must be a string or an integer, found {excerpt(uid)}")
  title = _required(path, line, record, "title")
  if "content" not in record:
    data_warnings.add(path, line, "no key 'content' (read as empty)")
  content = record.get("content", "")
  for key, value in (("title", title), ("content", content)):
    if not isinstance(value, str):
      raise InputError(f"{path}:{line}: key '{key}' must be a string, found {excerpt(value)}")
  if not title.strip():
    data_warnings.add(path, line, "an empty title")
  texts = {"uid": str(uid), "title": title, "content": content}
  return {key: _encodable(path, line, text, data_warnings) for key, text in texts.items()}


def _encodable(path: RawFile, line: int, text: str, data_warnings: DataWarnings) -> str:
  """Returns a text that UTF-8 can store: JSON can contain half of a surrogate pair, which UTF-8 cannot."""
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    data_warnings.add(path, line, "half a surrogate pair in its text (replaced)")
    return text.encode(errors="surrogatepass").decode(errors="replace")


def checked_targets(
  path: RawFile,
  line: int,
  ids: list[int],
  relevance: list[float],
  num_labels: int,
  data_warnings: DataWarnings,
  names: tuple[str, str] = ("target_ind", "target_rel"),
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `target_ind`, int32, and `target_rel`, float32, of a query; the first of repeated labels is kept.

  Args:
    path: File that is read.
    line: Its line.
    ids: Labels.
    relevance: Relevance of each of them.
    num_labels: L.
    data_warnings: Counts rows without labels and repeated labels.
    names: Names of both lists in messages.

  Raises:
    InputError: The lists have different lengths, a label is not in 0..L-1, or a relevance is not finite.
  """
  ids_name, relevance_name = names
  if len(ids) != len(relevance):
    raise InputError(
      f"{path}:{line}: {ids_name} has {len(ids)} entries and {relevance_name} {len(relevance)}; they must have equal "
      "lengths"
    )
  if not ids:
    data_warnings.add(path, line, "no labels")
  elif min(ids) < 0 or max(ids) >= num_labels:
    label = next(label for label in ids if not 0 <= label < num_labels)
    raise InputError(
      f"{path}:{line}: {ids_name} has label {label}, but labels are 0 to {num_labels - 1} (the lines of the file of "
      "labels, counted from 0)"
    )
  if not all(abs(number) <= _LARGEST for number in relevance):  # NaN is not, either.
    raise InputError(f"{path}:{line}: {relevance_name} has a number that is not finite in float32; replace it")
  if len(set(ids)) < len(ids):
    data_warnings.add(path, line, f"repeated labels in {ids_name} (the first of each is kept)")
    firsts = dict(zip(reversed(ids), reversed(relevance), strict=True))
    ids = list(dict.fromkeys(ids))
    relevance = [firsts[label] for label in ids]
  return np.asarray(ids, np.int32), np.asarray(relevance, np.float32)


def _required(path: RawFile, line: int, record: dict[str, Any], key: str) -> Any:
  if key not in record:
    raise InputError(f"{path}:{line}: key '{key}' is missing; found {', '.join(record) or 'no keys'}")
  return record[key]


def _list(path: RawFile, line: int, record: dict[str, Any], key: str, types: tuple[type, ...], kind: str) -> list[Any]:
  values = _required(path, line, record, key)
  if not isinstance(values, list):
    raise InputError(f"{path}:{line}: key '{key}' must be a list of {kind}, found {excerpt(values)}")
  if not set(map(type, values)) <= set(types):
    wrong = next(value for value in values if type(value) not in types)
    raise InputError(f"{path}:{line}: key '{key}' must be a list of {kind}, but contains {excerpt(wrong)}")
  return values


def check_unique(path: RawFile, hashes: np.ndarray) -> None:
  """Checks that no two labels have the same hash of their uid, int64 [L].

  Raises:
    InputError: Two are equal. The message names both lines.
  """
  order = np.argsort(hashes, kind="stable")
  same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
  if len(same):
    pair = min(same, key=lambda i: order[i + 1])
    first, second = order[pair] + 1, order[pair + 1] + 1
    raise InputError(
      f"{path}:{second}: the same uid as line {first}; every label must occur once, since its line is its id"
    )


def excerpt(value: Any) -> str:
  """Returns at most 40 characters of a value, on one line."""
  text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value)
  return repr(text if len(text) <= 40 else text[:37] + "...")
