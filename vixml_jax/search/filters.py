"""Filters that say which labels each query may have, and search that applies them."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import TypeVar

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.host_search import search_rows
from vixml_jax.search.index import Index, search_excluding
from vixml_jax.search.membership import is_in_row
from vixml_jax.search.prefixes import ScaledPrefixes

GATHER_AT_MOST = 16_384
"""Largest number of allowed labels that are scored one by one on the host."""
OVERFETCH_AT_MOST = 1_024
"""Largest number of denied labels for which as many more labels are searched for."""
MASKS_PER_PASS = 8
"""Number of masks that exact search applies in one pass."""
_MAX_WIDTH = 8_192

_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True, repr=False)
class IdSets:
  """A set of label ids for each query; queries may share one, so that a large category is stored once.

  >>> sets = IdSets.from_rows([[3, 1], None, []])
  >>> sets.sizes.tolist(), sets.has_set.tolist()
  ([2, 0, 0], [True, False, True])

  Attributes:
    sets: Label ids of each set, ascending and distinct, G rows. `from_ragged` sorts them.
    set_of_query: int32 [Q], the row of `sets` of each query; -1 for a query without a set.
  """

  sets: Ragged
  set_of_query: np.ndarray

  def __len__(self) -> int:
    return len(self.set_of_query)

  def __repr__(self) -> str:
    return f"IdSets(queries={len(self)}, sets={len(self.sets)})"

  @classmethod
  def from_ragged(cls, sets: Ragged, set_of_query: np.ndarray | None = None) -> "IdSets":
    """Returns sets with the given ids, which may be unsorted and repeated.

    Args:
      sets: Label ids, G rows.
      set_of_query: The row of each query [Q], -1 for no set; None if row i belongs to query i.
    """
    stride = int(sets.values.max(initial=0)) + 1
    keys = np.unique(sets.row_ids() * stride + sets.values)
    lengths = np.bincount(keys // stride, minlength=len(sets))
    set_of_query = np.arange(len(sets)) if set_of_query is None else set_of_query
    return cls(Ragged((keys % stride).astype(np.int32), offsets_of(lengths)), np.asarray(set_of_query, np.int32))

  @classmethod
  def from_rows(cls, rows: Sequence[Sequence[int] | None]) -> "IdSets":
    """Returns the sets of a short list that holds the ids of each query, or None for a query without a set."""
    has_set = np.asarray([row is not None for row in rows], bool)
    sets = Ragged.from_rows([row for row in rows if row is not None])
    return cls.from_ragged(sets, np.where(has_set, np.cumsum(has_set) - 1, -1))

  @property
  def has_set(self) -> np.ndarray:
    """bool [Q], whether each query has a set."""
    return self.set_of_query >= 0

  @property
  def sizes(self) -> np.ndarray:
    """int64 [Q], the size of each query's set; 0 for a query without one."""
    return np.append(self.sets.lengths, 0)[self.set_of_query]

  def take(self, queries: np.ndarray) -> "IdSets":
    """Returns the sets of the given queries, in the given order, without sets that none of them uses."""
    used, set_of_query = np.unique(self.set_of_query[queries], return_inverse=True)
    without = int(len(used) > 0 and used[0] < 0)
    return IdSets(self.sets.take(used[without:]), (set_of_query - without).astype(np.int32))

  def rows(self) -> Ragged:
    """Returns the ids of each query, Q rows, empty for a query without a set; shared sets are repeated."""
    with_empty_row = Ragged(self.sets.values, np.append(self.sets.offsets, self.sets.offsets[-1]))
    return with_empty_row.take(np.where(self.has_set, self.set_of_query, len(self.sets)))


@dataclasses.dataclass(frozen=True)
class Filters:
  """Labels that each of Q queries may have.

  Attributes:
    allow: The only labels that a query may have. A query without a set may have all labels, one with an empty set
      none. None if no query has a set.
    deny: Labels that a query may not have, even if they are allowed.
  """

  allow: IdSets | None = None
  deny: IdSets | None = None

  def check(self, num_queries: int, num_labels: int) -> None:
    """Checks that the filters fit the queries and the labels.

    Raises:
      InputError: An id is not that of a label.
      ValueError: The number of filters is not that of the queries.
    """
    for name, part in (("allow", self.allow), ("deny", self.deny)):
      if part is None:
        continue
      if len(part) != num_queries:
        raise ValueError(f"{num_queries} queries but {len(part)} filters ({name})")
      wrong = part.sets.values[(part.sets.values < 0) | (part.sets.values >= num_labels)]
      if len(wrong):
        raise InputError(f"filter {name}: there is no label {wrong[0]}; ids are from 0 to {num_labels - 1}")

  def take(self, queries: np.ndarray) -> "Filters":
    """Returns the filters of the given queries, in the given order."""
    return Filters(*(None if part is None else part.take(queries) for part in (self.allow, self.deny)))

  def permits(self, ids: np.ndarray) -> np.ndarray:
    """Returns bool [Q, K], whether each query may have the labels `ids` [Q, K]; False for id -1."""
    permitted = ids >= 0
    if self.allow is not None:
      permitted &= is_in_row(ids, self.allow.sets, self.allow.set_of_query) | ~self.allow.has_set[:, None]
    if self.deny is not None:
      permitted &= ~is_in_row(ids, self.deny.sets, self.deny.set_of_query)
    return permitted


def keep_permitted(scores: np.ndarray, ids: np.ndarray, permitted: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns scores and ids [Q, K] of the first k permitted results of each row; -inf and -1 fill missing places.

  Args:
    scores: Scores [Q, K'], in descending order.
    ids: Ids [Q, K'].
    permitted: bool [Q, K'], the results to keep.
    k: Number of results, at most K'.
  """
  kept = np.argsort(~permitted, axis=1, kind="stable")[:, :k]
  scores, ids = np.where(permitted, scores, -np.inf), np.where(permitted, ids, -1)
  return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def search_filtered(
  index: Index, embeddings: np.ndarray | ScaledPrefixes, live: np.ndarray, queries: np.ndarray, k: int, filters: Filters
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k best labels among those that each query may have.

  Let A be the live labels that a query may have. One of four strategies is chosen for each query, by sizes alone:

  1. Gather, for an allow set of at most `GATHER_AT_MOST` labels: A is scored label by label on the host. The result is
     exact with either index.
  2. Overfetch, without an allow set and with at most `OVERFETCH_AT_MOST` denied labels: `search_excluding`. At most e
     of the k + e best labels are denied, so at least k of them are in A, and labels of A beyond them score no higher.
  3. Mask, for other queries of an exact index: all labels are scored on the devices and those outside A get -inf, for
     up to `MASKS_PER_PASS` different sets in a pass. Queries that differ only in a few denied labels share a mask; the
     denied labels are overfetched as in 2.
  4. Widen, for other queries of another index: w labels are searched for, where w is twice the number that would
     suffice if A were spread evenly. It is doubled for queries that find fewer than k labels of A. If k are found, they
     are the k best of A that the index can find: results are listed by score, so labels that a greater w adds score no
     higher.

  An approximate index may find fewer than k labels of A with 2 and 4. Then A is scored on the host as
  in 1. A row therefore has fewer than k labels only if A has.

  Args:
    index: Index of the live labels.
    embeddings: float32 [L, D], embeddings of all labels.
    live: bool [L], whether each label may be found by any query.
    queries: Queries float32 [Q, D].
    k: Number of labels to return for each query, at least 1.
    filters: Filters of the Q queries.

  Returns:
    Scores float32 [Q, K] in descending order and ids int32 [Q, K]. Score -inf and id -1 fill the places of a query that
    may have fewer labels.

  Raises:
    InputError: An id in a filter is not that of a label.
  """
  filters.check(len(queries), len(embeddings))
  search = _FilteredSearch(index, embeddings, live, queries, k, filters)
  gathered, overfetched = np.zeros(len(queries), bool), np.ones(len(queries), bool)
  if filters.allow is not None:
    gathered = filters.allow.has_set & (filters.allow.sizes <= GATHER_AT_MOST)
    overfetched = ~filters.allow.has_set
  if filters.deny is not None:
    overfetched &= filters.deny.sizes <= OVERFETCH_AT_MOST
  search.gather(np.flatnonzero(gathered))
  search.overfetch(np.flatnonzero(overfetched))
  others = np.flatnonzero(~gathered & ~overfetched)
  if isinstance(index, ExactIndex):
    search.mask(others)
  else:
    search.widen(others)
  return search.scores, search.ids


class _FilteredSearch:
  """State of one call of `search_filtered`.

  Attributes:
    scores: float32 [Q, K], filled by the strategies for the queries that they are called with.
    ids: int32 [Q, K], likewise.
  """

  def __init__(
    self,
    index: Index,
    embeddings: np.ndarray | ScaledPrefixes,
    live: np.ndarray,
    queries: np.ndarray,
    k: int,
    filters: Filters,
  ):
    self.scores = np.full((len(queries), k), -np.inf, np.float32)
    self.ids = np.full((len(queries), k), -1, np.int32)
    self._index, self._embeddings, self._live = index, embeddings, live
    self._queries, self._k, self._filters = queries, k, filters
    self._allow, self._deny = (
      IdSets.from_rows([None] * len(queries)) if part is None else part for part in (filters.allow, filters.deny)
    )
    # Many denied labels are part of a mask; few are overfetched.
    many = self._deny.sizes > OVERFETCH_AT_MOST
    self._masked_deny_set = np.where(many, self._deny.set_of_query, -1)
    self._num_overfetched = np.where(many, 0, self._deny.sizes)

  def gather(self, queries: np.ndarray) -> None:
    """Strategy 1: reads and scores the permitted labels, once for all queries that share a mask."""
    for members in self._groups(queries):
      rows = np.flatnonzero(self._mask(members[0]))
      width = min(self._width(members), max(len(rows), self._k))
      self._store(members, *search_rows(self._embeddings, rows, self._queries[members], width))

  def overfetch(self, queries: np.ndarray) -> None:
    """Strategy 2: searches for as many more labels as are denied."""
    if not len(queries):
      return
    exclude = self._deny.take(queries).rows()
    self._store(queries, *search_excluding(self._index, self._queries[queries], self._k, exclude))
    if not isinstance(self._index, ExactIndex):
      self.gather(self._incomplete(queries, self._index.num_labels))

  def mask(self, queries: np.ndarray) -> None:
    """Strategy 3: scores all labels of an exact index and masks some, for several masks in a pass."""
    assert isinstance(self._index, ExactIndex)
    groups = self._groups(queries)
    for start in range(0, len(groups), MASKS_PER_PASS):
      part = groups[start : start + MASKS_PER_PASS]
      members = np.concatenate(part)
      masks = np.stack([self._mask(group[0]) for group in part])
      mask_of_query = np.repeat(np.arange(len(part)), [len(group) for group in part])
      self._store(members, *self._index.search(self._queries[members], self._width(members), masks, mask_of_query))

  def widen(self, queries: np.ndarray) -> None:
    """Strategy 4: searches for more and more labels until enough of them are permitted."""
    for members in self._groups(queries):
      size = int(self._mask(members[0]).sum())
      width = next_power_of_two(math.ceil(2 * self._width(members) * self._index.num_labels / max(size, 1)))
      while len(members) and width <= _MAX_WIDTH:
        self._store(members, *self._index.search(self._queries[members], width))
        members, width = self._incomplete(members, size), 2 * width
      self.gather(members)

  def _groups(self, queries: np.ndarray) -> list[np.ndarray]:
    """Returns the queries in groups that share a mask."""
    allow, deny = self._allow.set_of_query, self._masked_deny_set
    order = queries[np.lexsort((deny[queries], allow[queries]))]
    differs = (np.diff(allow[order]) != 0) | (np.diff(deny[order]) != 0)
    return np.split(order, np.flatnonzero(differs) + 1) if len(order) else []

  def _mask(self, query: int) -> np.ndarray:
    """Returns bool [L], the labels that the group of a query may have, except for overfetched ones."""
    allow, deny = self._allow.set_of_query[query], self._masked_deny_set[query]
    mask = self._live.copy()
    if allow >= 0:
      allowed = self._allow.sets[allow]
      mask[:] = False
      mask[allowed] = self._live[allowed]
    if deny >= 0:
      mask[self._deny.sets[deny]] = False
    return mask

  def _width(self, members: np.ndarray) -> int:
    """Returns k plus the most overfetched labels of a query, rounded up so that few widths are compiled."""
    most = int(self._num_overfetched[members].max(initial=0))
    return max(self._k, min(self._k + (next_power_of_two(most) if most else 0), self._index.num_labels))

  def _incomplete(self, queries: np.ndarray, available: int) -> np.ndarray:
    """Returns the queries that have fewer than k labels, and fewer than are available."""
    return queries[(self.ids[queries] >= 0).sum(axis=1) < min(self._k, available)]

  def _store(self, members: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
    """Stores the first k results that the queries may have."""
    permitted = self._filters.take(members).permits(ids)
    self.scores[members], self.ids[members] = keep_permitted(scores, ids, permitted, self._k)


def shared_sets(keys: Sequence[_Key | None], ids_of: Callable[[_Key], np.ndarray]) -> IdSets | None:
  """Returns for every query the set of ids of its key, computed once for each distinct key; None if there is no key."""
  numbers = {key: number for number, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
  if not numbers:
    return None
  set_of_query = [-1 if key is None else numbers[key] for key in keys]
  return IdSets.from_ragged(Ragged.from_rows([ids_of(key) for key in numbers]), np.asarray(set_of_query))
