"""Reads the rows of a table for the first time: checks them, and decides which are for testing."""

import array
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import itertools
import re
from typing import Any
import zlib

import numpy as np

from vixml_jax.datasets.uids import hash_of_uid
from vixml_jax.errors import InputError
from vixml_jax.input.near_duplicates import split_hashes
from vixml_jax.ragged import Ragged
from vixml_jax.stages import stage
from vixml_jax.tables.cells import CellError, LabelCells, text_of, uid_of
from vixml_jax.tables.columns import Columns
from vixml_jax.tables.parts import Part, RowBatch
from vixml_jax.tables.sources import SPLITS, SourcePart, split_named

ROWS_AT_ONCE = 4096
"""Number of rows that are read at a time, without their images."""
_WORD = re.compile(r"\w+")
_WORD_IDS = 1 << 22  # Words are hashed to so many ids.
TRAIN, TEST, VALIDATION, OPEN = 0, 1, 2, -1
"""Codes of the splits of rows; OPEN if neither the part nor a column says."""
_CODES = {"train": TRAIN, "test": TEST, "validation": VALIDATION, "": OPEN}


@dataclasses.dataclass(frozen=True)
class FirstReading:
  """What the first reading of a table finds.

  Attributes:
    is_test: Whether each row is for testing, bool [N].
    uids: Hashes of the uids, int64 [N]; empty if there is no column of uids.
    labels: How labels are read.
    label_form: The same in words.
    split_form: In words, how rows were split.
  """

  is_test: np.ndarray
  uids: np.ndarray
  labels: LabelCells
  label_form: str
  split_form: str


def read_first(
  sources: Sequence[SourcePart], columns: Columns, separator: str | None, test_fraction: float, seed: int
) -> FirstReading:
  """Reads all rows except their images.

  Args:
    sources: Parts of the table.
    columns: Its columns.
    separator: Separator of labels; None lets the cells decide.
    test_fraction: Share of the rows that are for testing, if the table does not say.
    seed: Seed of that choice.

  Raises:
    InputError: A row cannot be used, or one of the splits has no row.
  """
  is_open = not columns.split and not sources[0].split
  kept = _Kept(columns, LabelCells(separator), is_open)
  with stage("read the table", unit="row", logged=False) as progress:
    for source in sources:
      for batch in source.part.batches(kept.names, ROWS_AT_ONCE):
        progress.advance(kept.add(batch, source.split))
  parts = [source.part for source in sources]
  if not kept.codes:
    raise InputError(f"{parts[0].name}: has no rows; add at least one")
  if is_open:
    is_test = _split(parts[0].name, kept.tokens(), test_fraction, seed)
    form = f"made here, {test_fraction:.0%} for testing (--test_fraction), texts that are nearly the same on one side"
  else:
    is_test, form = _given(parts[0].name, np.frombuffer(kept.codes, np.int8), columns.split)
  uids = np.frombuffer(kept.uids, np.int64)
  _check_unique(uids, is_test, parts, columns)
  try:
    label_form = kept.labels.decide(lambda row: place_of_row(parts, columns.labels, row))
  except CellError as error:
    raise InputError(f"column {columns.labels!r}: {error}") from error
  return FirstReading(is_test, uids, kept.labels, label_form, form)


class _Kept:
  """What the first reading keeps of each row.

  Attributes:
    names: The columns that it reads.
    labels: What it saw of the labels.
    codes: Code of the split of each row.
    uids: Hash of the uid of each row; empty without a column of uids.
  """

  def __init__(self, columns: Columns, labels: LabelCells, keeps_words: bool):
    self._columns, self._keeps_words = columns, keeps_words
    self.names = [name for name in (columns.text, columns.labels, columns.uid, columns.split) if name]
    self.labels = labels
    self.codes, self.uids = array.array("b"), array.array("q")
    self._words, self._lengths = array.array("i"), array.array("i")

  def add(self, batch: RowBatch, split: str) -> int:
    """Checks the rows of a batch of a part with this split, keeps what is needed, and returns their number."""
    columns = self._columns
    texts = checked(batch, columns.text, text_of)
    for row, value in enumerate(batch.columns[columns.labels or ""], len(self.codes)):
      self.labels.look(value, row)
    if columns.uid:
      self.uids.extend(map(hash_of_uid, checked(batch, columns.uid, uid_of)))
    if columns.split:
      self.codes.extend(checked(batch, columns.split, _split_code))
    else:
      self.codes.extend(itertools.repeat(_CODES[split], len(texts)))
    for text in texts if self._keeps_words else ():
      found = _WORD.findall(text.lower()) or [text]  # A text of symbols is one word.
      words = [zlib.crc32(word.encode()) % _WORD_IDS for word in found]
      self._words.extend(words)
      self._lengths.append(len(words))
    return len(texts)

  def tokens(self) -> Ragged:
    """Returns the hashes of the words of each row."""
    return Ragged.of_lengths(np.frombuffer(self._words, np.int32), np.frombuffer(self._lengths, np.int32))


def checked(batch: RowBatch, column: str | None, check: Callable[[Any], Any]) -> list[Any]:
  """Returns the checked values of a column of a batch.

  Raises:
    InputError: `check` raised `CellError` for one; the message names its place.
  """
  values, results = batch.columns[column or ""], []
  try:
    for value in values:
      results.append(check(value))
  except CellError as error:
    raise InputError(f"{batch.where(len(results))}, column {column!r}: {error}") from error
  return results


@contextlib.contextmanager
def cell_errors(batch: RowBatch, row: int, column: str | None) -> Iterator[None]:
  """Turns a `CellError` of the block into an `InputError` that names the place."""
  try:
    yield
  except CellError as error:
    raise InputError(f"{batch.where(row)}, column {column!r}: {error}") from error


def place_of_row(parts: Sequence[Part], column: str | None, row: int) -> str:
  """Returns the place of a row, counted over all parts, by reading a column again; for messages."""
  for part in parts:
    for batch in part.batches([column or ""], ROWS_AT_ONCE):
      count = len(batch.columns[column or ""])
      if row < count:
        return batch.where(row)
      row -= count
  raise IndexError(row)


def first_repeated(hashes: np.ndarray) -> tuple[int, int] | None:
  """Returns the first row whose hash an earlier one has, after that one; None if all differ."""
  order = np.argsort(hashes, kind="stable")
  same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
  if not len(same):
    return None
  pair = min(same, key=lambda i: order[i + 1])
  return int(order[pair]), int(order[pair + 1])


def _split_code(value: Any) -> int:
  name = text_of(value)
  split = split_named(name)
  if split is None:
    raise CellError(f"is {name!r:.40}; a split is {', '.join(SPLITS)}: correct it, or give --split_column=")
  return _CODES[split]


def _split(name: str, tokens: Ragged, fraction: float, seed: int) -> np.ndarray:
  """Chooses rows for testing by hashes that near-duplicates share, at least one on each side."""
  hashes = split_hashes(tokens, seed)
  if (hashes == hashes[0]).all():
    raise InputError(f"{name}: all texts are nearly the same, so no test rows can be set apart; give --test_data")
  is_test = hashes < np.uint64(fraction * 2**64)
  if not is_test.any():
    return hashes == hashes.min()
  return hashes != hashes.max() if is_test.all() else is_test


def _given(name: str, codes: np.ndarray, column: str | None) -> tuple[np.ndarray, str]:
  """Returns which rows are for testing by the split that the table gives, and how it was used in words."""
  counts = {split: int((codes == code).sum()) for split, code in _CODES.items()}
  form = "given by " + (f"column {column!r}" if column else "the files")
  if counts["validation"]:
    form += "; validation rows are for " + ("training" if counts["test"] else "testing")
  is_test = codes == (TEST if counts["test"] else VALIDATION)
  for split, rows in (("training", ~is_test), ("testing", is_test)):
    if not rows.any():
      raise InputError(f"{name}: no row is for {split}; add some, or name no split with --split_column=")
  return is_test, form


def _check_unique(hashes: np.ndarray, is_test: np.ndarray, parts: Sequence[Part], columns: Columns) -> None:
  """Checks that no two rows for training, and no two for testing, have the same uid."""
  if not len(hashes):
    return
  for rows in (np.flatnonzero(~is_test), np.flatnonzero(is_test)):
    pair = first_repeated(hashes[rows])
    if pair:
      first, second = (place_of_row(parts, columns.uid, int(rows[place])) for place in pair)
      raise InputError(
        f"{second}, column {columns.uid!r}: the same uid as {first}; correct it, or name no uids with --uid_column="
      )
