"""The labels that are removed before a query is scored: read from filter files, or made from the uids.

Where queries and labels are of one kind, such as products that are bought together, a query's own item is a label. It
is not an answer. Neither is, for a test query B, a label A whose training query lists B: the pair was seen in training
in the other direction. The rule is that of github kunaldahiya/pyxclib, pull request 29.
"""

from collections.abc import Callable, Iterator
import dataclasses
import itertools
import logging
from typing import Any
import zlib

import numpy as np

from vixml_jax.datasets import raw_records, raw_rows
from vixml_jax.datasets.raw import FoundFiles
from vixml_jax.datasets.uids import UidTable, hash_of_uid
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.stages import counted

_log = logging.getLogger(__name__)
_ROWS_PER_BLOCK = 8192

_Visit = Callable[[np.ndarray, Ragged], None]


@dataclasses.dataclass(frozen=True)
class RawFilters:
  """Labels to remove before each query is scored.

  Attributes:
    train: Ascending label ids of each training query, N rows of int32.
    test: The same for the test queries, M rows.
    metadata: JSON object: `source` (`files`, `uids`, or `none` if no query is a label), `pairs` by split, and for
      `uids` how many of them are `own` (a query and the label with its uid, by split) and `reverse` (of training
      pairs).
  """

  train: Ragged
  test: Ragged
  metadata: dict[str, Any]


def load_filters(files: dict[str, FoundFiles], counts: dict[str, int], allow_empty: bool = False) -> RawFilters:
  """Reads the filter files, or makes filters from the uids if there are none; logs which, and the number of pairs.

  Args:
    files: Raw files of each split.
    counts: Number of rows of each split.
    allow_empty: Accept a filter file without pairs for a set where queries are labels.

  Raises:
    InputError: A row or a line of a filter cannot be used, or a filter has no pairs although a query has the uid of a
      label.
  """
  if files["train"].filter is None:
    return make_filters(files, counts)
  filters = {}
  for split in ("train", "test"):
    path = files[split].filter
    assert path is not None
    filters[split] = raw_records.read_filter(path, counts[split], counts["labels"])
    if not len(filters[split].values) and not allow_empty:
      _check_that_no_query_is_a_label(files, split, counts)
  pairs = {split: len(rows.values) for split, rows in filters.items()}
  read = [f"{files[split].filter} ({count:,} pairs)" for split, count in pairs.items()]
  _log.info("filters: read from %s", " and ".join(read))
  return RawFilters(**filters, metadata={"source": "files", "pairs": pairs})


def make_filters(files: dict[str, FoundFiles], counts: dict[str, int]) -> RawFilters:
  """Makes filters from the uids of queries and labels and the positives of the training queries.

  The pairs are, for both splits, a query and the label with its uid; and for a test query, also each label whose uid is
  that of a training query that has the test query's uid among its positives.

  Args:
    files: Raw files of each split.
    counts: Number of rows of each split.

  Raises:
    InputError: A row cannot be used.
  """
  num_labels = counts["labels"]
  labels = _Labels.read(files, counts)
  test = _own_labels(_read_blocks(files, "test", counts), labels)
  is_test_label = np.zeros(num_labels, bool)
  is_test_label[test.own[test.own >= 0]] = True
  reverse = []

  def keep_reverse_pairs(own: np.ndarray, targets: Ragged) -> None:
    sources, found = np.repeat(own, targets.lengths), targets.values
    kept = (sources >= 0) & is_test_label[found]
    reverse.append(found[kept].astype(np.int64) * num_labels + sources[kept])

  train = _own_labels(_read_blocks(files, "train", counts), labels, keep_reverse_pairs)
  by_label = raw_records.filter_rows(np.concatenate([*reverse, np.zeros(0, np.int64)]), num_labels, num_labels)
  rows = np.flatnonzero(test.own >= 0)
  found = by_label.take(test.own[rows])
  reverse_pairs = np.repeat(rows, found.lengths) * num_labels + found.values
  own_pairs = {split: _own_pairs(part.own, num_labels) for split, part in (("train", train), ("test", test))}
  filters = {
    "train": raw_records.filter_rows(own_pairs["train"], counts["train"], num_labels),
    "test": raw_records.filter_rows(np.concatenate([own_pairs["test"], reverse_pairs]), counts["test"], num_labels),
  }
  own = {split: len(pairs) for split, pairs in own_pairs.items()}
  made = RawFilters(
    **filters,
    metadata={
      "source": "uids" if any(own.values()) else "none",
      "pairs": {split: len(pairs.values) for split, pairs in filters.items()},
      "own": own,
      "reverse": len(filters["test"].values) - own["test"],
    },
  )
  _report(made.metadata, train.other_titles + test.other_titles)
  return made


def _report(metadata: dict[str, Any], other_titles: int) -> None:
  """Logs which filters were made."""
  own = metadata["own"]
  if metadata["source"] == "none":
    _log.info("filters: no filter files, and no query has the uid of a label: no label is removed before scoring")
    return
  _log.info(
    "filters: no filter files, so made from the uids: own label of %s training and %s test queries, and %s reverse "
    "pairs of training for test queries",
    *(f"{count:,}" for count in (own["train"], own["test"], metadata["reverse"])),
  )
  total = own["train"] + own["test"]
  if other_titles > total / 2:
    _log.warning(
      "%s of the %s queries with the uid of a label have another title than that label: a uid must name the same item "
      "in all files. If your uids are row numbers, give filter files (docs/data.md)",
      f"{other_titles:,}",
      f"{total:,}",
    )


def _check_that_no_query_is_a_label(files: dict[str, FoundFiles], split: str, counts: dict[str, int]) -> None:
  labels, start = _Labels.read(files, counts), 0
  for block in _read_blocks(files, split, counts):
    own = labels.table.find(block.hashes)
    found = np.flatnonzero(own >= 0)
    if len(found):
      row = int(found[0])
      raise InputError(
        f"{files[split].filter}: has no pairs, but row {start + row} of {files[split].rows.name} has the uid of label "
        f"{own[row]}: a query's own item would count as an answer; delete both filter files, so that filters are made "
        "from the uids, or set --config.dataset.allow_empty_filter=True if nothing is to be removed"
      )
    start += len(own)


@dataclasses.dataclass(frozen=True)
class _UidBlock:
  """Rows that follow one another: hashes of uids and titles, int64 [R], and positives, R rows."""

  hashes: np.ndarray
  titles: np.ndarray
  targets: Ragged


def _read_blocks(files: dict[str, FoundFiles], split: str, counts: dict[str, int]) -> Iterator[_UidBlock]:
  """Yields all rows of a split."""
  # Unusual values are counted when the rows are written.
  rows = raw_rows.read_rows(files[split], split, counts, raw_records.DataWarnings())
  rows = counted(rows, f"read uids of {split}", total=counts[split], unit="row")
  while block := list(itertools.islice(rows, _ROWS_PER_BLOCK)):
    targets = [row.get("target_ind", np.zeros(0, np.int32)) for row in block]
    yield _UidBlock(
      np.array([hash_of_uid(row["uid"]) for row in block], np.int64),
      np.array([zlib.crc32(row["title"].strip().encode()) for row in block], np.int64),
      Ragged.of_lengths(np.concatenate(targets), [len(ids) for ids in targets]),
    )


@dataclasses.dataclass(frozen=True)
class _Labels:
  """Table of the labels' uids, and hashes of their titles, int64 [L]."""

  table: UidTable
  titles: np.ndarray

  @classmethod
  def read(cls, files: dict[str, FoundFiles], counts: dict[str, int]) -> "_Labels":
    blocks = list(_read_blocks(files, "labels", counts))
    hashes = np.concatenate([block.hashes for block in blocks])
    return cls(UidTable(hashes), np.concatenate([block.titles for block in blocks]))


@dataclasses.dataclass(frozen=True)
class _OwnLabels:
  """The label with the uid of each query, or -1, int32 [N], and how many of them have another title than the query."""

  own: np.ndarray
  other_titles: int


def _own_labels(blocks: Iterator[_UidBlock], labels: _Labels, visit: _Visit = lambda own, targets: None) -> _OwnLabels:
  """Finds the label with the uid of each query; calls `visit` with those and the positives of each block."""
  own, other_titles = [], 0
  for block in blocks:
    found = labels.table.find(block.hashes)
    other_titles += int(((labels.titles[found] != block.titles) & (found >= 0)).sum())
    visit(found, block.targets)
    own.append(found)
  return _OwnLabels(np.concatenate(own), other_titles)


def _own_pairs(own: np.ndarray, num_labels: int) -> np.ndarray:
  """Returns `row * num_labels + label` for every query that is a label."""
  rows = np.flatnonzero(own >= 0)
  return rows * num_labels + own[rows]
