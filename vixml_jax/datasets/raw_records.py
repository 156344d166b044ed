"""Reads queries, labels and filters of a raw folder row by row, and names the file and the line of every mistake."""

import array
from collections.abc import Iterator
import gzip
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any
import zlib

import numpy as np

from vixml_jax.datasets.raw import SPLITS
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged

_CHUNK_BYTES = 1 << 20


class DataWarnings:
  """Counts of unusual values that published data sets are known to contain, so that each kind is logged once."""

  def __init__(self) -> None:
    self._seen: dict[tuple[str, str], list[int]] = {}

  def add(self, path: Path, line: int, what: str) -> None:
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


def count_rows(path: Path) -> int:
  """Returns the number of lines of a gzip file. The last line may lack its newline.

  Raises:
    InputError: The file is not a gzip file, or is truncated or damaged.
  """
  rows, last = 0, b"\n"
  try:
    with gzip.open(path, "rb") as file:
      # Unlike read, read1 returns the data before a truncation, so that the message can name the line.
      while chunk := file.read1(_CHUNK_BYTES):
        rows += chunk.count(b"\n")
        last = chunk[-1:]
  except (EOFError, OSError, zlib.error) as error:
    raise _damaged(path, rows + 1, error) from error
  return rows + (last != b"\n")


def read_queries(path: Path, num_labels: int, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
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
    row["target_ind"], row["target_rel"] = _targets(path, line, record, num_labels, data_warnings)
    yield row


def read_labels(path: Path, data_warnings: DataWarnings) -> Iterator[dict[str, Any]]:
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
    digest = hashlib.blake2b(row["uid"].encode(), digest_size=8).digest()
    hashes.append(int.from_bytes(digest, "little", signed=True))
    yield row
  _check_unique(path, np.frombuffer(hashes, np.int64))


def read_filter(path: Path, num_rows: int, num_labels: int) -> Ragged:
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
  with path.open("rb") as file:
    for line, text in enumerate(file, 1):
      fields = text.split()
      if not fields:
        continue
      if len(fields) != 2 or not fields[0].isdigit() or not fields[1].isdigit():
        raise InputError(
          f"{path}:{line}: expected 'row label', two integers, but found {_excerpt(text)}; correct or delete the line"
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
      pairs.append(row * num_labels + label)
  unique = np.unique(np.frombuffer(pairs, np.int64))
  counts = np.bincount(unique // num_labels, minlength=num_rows)
  return Ragged.of_lengths((unique % num_labels).astype(np.int32), counts)


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields line number and JSON object of every line."""
  line = 0
  try:
    with gzip.open(path, "rb") as file:
      for line, raw in enumerate(file, 1):
        yield line, _parse(path, line, raw)
  except (EOFError, OSError, zlib.error) as error:
    raise _damaged(path, line + 1, error) from error


def _parse(path: Path, line: int, raw: bytes) -> dict[str, Any]:
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
    record = json.loads(text)
  except (json.JSONDecodeError, RecursionError) as error:
    reason = "nested too deeply"
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
  return InputError(f"{path}:{line}: cannot be read ({error}); check its permissions and the disk")


def _text_fields(path: Path, line: int, record: dict[str, Any], data_warnings: DataWarnings) -> dict[str, Any]:
  uid = _required(path, line, record, "uid")
  if type(uid) not in (str, int):
    raise InputError(f"{path}:{line}: key 'uid' must be a string or an integer, found {_excerpt(uid)}")
  title = _required(path, line, record, "title")
  if "content" not in record:
    data_warnings.add(path, line, "no key 'content' (read as empty)")
  content = record.get("content", "")
  for key, value in (("title", title), ("content", content)):
    if not isinstance(value, str):
      raise InputError(f"{path}:{line}: key '{key}' must be a string, found {_excerpt(value)}")
  if not title.strip():
    data_warnings.add(path, line, "an empty title")
  texts = {"uid": str(uid), "title": title, "content": content}
  return {key: _encodable(path, line, text, data_warnings) for key, text in texts.items()}


def _encodable(path: Path, line: int, text: str, data_warnings: DataWarnings) -> str:
  """Returns a text that UTF-8 can store: JSON can contain half of a surrogate pair, which UTF-8 cannot."""
  try:
    text.encode()
    return text
  except UnicodeEncodeError:
    data_warnings.add(path, line, "half a surrogate pair in its text (replaced)")
    return text.encode(errors="surrogatepass").decode(errors="replace")


def _targets(
  path: Path, line: int, record: dict[str, Any], num_labels: int, data_warnings: DataWarnings
) -> tuple[np.ndarray, np.ndarray]:
  ids = _list(path, line, record, "target_ind", (int,), "integers")
  relevance = _list(path, line, record, "target_rel", (int, float), "numbers")
  if len(ids) != len(relevance):
    raise InputError(
      f"{path}:{line}: target_ind has {len(ids)} entries and target_rel {len(relevance)}; they must have equal lengths"
    )
  if not ids:
    data_warnings.add(path, line, "no labels")
  elif min(ids) < 0 or max(ids) >= num_labels:
    label = next(label for label in ids if not 0 <= label < num_labels)
    raise InputError(
      f"{path}:{line}: target_ind has label {label}, but labels are 0 to {num_labels - 1} (the lines of "
      f"{SPLITS['labels'].rows}, counted from 0)"
    )
  if not all(map(math.isfinite, relevance)):
    raise InputError(f"{path}:{line}: target_rel has a number that is not finite; replace it")
  if len(set(ids)) < len(ids):
    data_warnings.add(path, line, "repeated labels in target_ind (the first of each is kept)")
    firsts = dict(zip(reversed(ids), reversed(relevance), strict=True))
    ids = list(dict.fromkeys(ids))
    relevance = [firsts[label] for label in ids]
  return np.asarray(ids, np.int32), np.asarray(relevance, np.float32)


def _required(path: Path, line: int, record: dict[str, Any], key: str) -> Any:
  if key not in record:
    raise InputError(f"{path}:{line}: key '{key}' is missing; found {', '.join(record) or 'no keys'}")
  return record[key]


def _list(path: Path, line: int, record: dict[str, Any], key: str, types: tuple[type, ...], kind: str) -> list[Any]:
  values = _required(path, line, record, key)
  if not isinstance(values, list):
    raise InputError(f"{path}:{line}: key '{key}' must be a list of {kind}, found {_excerpt(values)}")
  if not set(map(type, values)) <= set(types):
    wrong = next(value for value in values if type(value) not in types)
    raise InputError(f"{path}:{line}: key '{key}' must be a list of {kind}, but contains {_excerpt(wrong)}")
  return values


def _check_unique(path: Path, hashes: np.ndarray) -> None:
  order = np.argsort(hashes, kind="stable")
  same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
  if len(same):
    pair = min(same, key=lambda i: order[i + 1])
    first, second = order[pair] + 1, order[pair + 1] + 1
    raise InputError(
      f"{path}:{second}: the same uid as line {first}; every label must occur once, since its line is its id"
    )


def _excerpt(value: Any) -> str:
  """Returns at most 40 characters of a value, on one line."""
  text = value.decode(errors="replace").strip() if isinstance(value, bytes) else json.dumps(value)
  return repr(text if len(text) <= 40 else text[:37] + "...")
