"""Which labels each query may have, and search that keeps to it."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.host_search import search_rows
from vixml_jax.search.index import Index, search_excluding
from vixml_jax.search.membership import is_in_row

GATHER_AT_MOST = 16_384
"""Allowed labels up to which they alone are scored, on the host."""
OVERFETCH_AT_MOST = 1_024
"""Denied labels up to which so many more labels are searched for."""
MASKS_AT_ONCE = 8
_WIDEST = 8_192


@dataclasses.dataclass(frozen=True)
class IdSets:
  """A set of label ids for every query; queries may share one, so that a large category is held once.

  Attributes:
    sets: G rows of ids, ascending and distinct (`of` sees to that).
    of_query: int32 [Q], the row of each query; -1 for a query without a set.
  """

  sets: Ragged
  of_query: np.ndarray

  def __len__(self) -> int:
    return len(self.of_query)

  @classmethod
  def of(cls, sets: Ragged, of_query: np.ndarray | None = None) -> "IdSets":
    """From rows with ids in any order, one for each query unless `of_query` says otherwise."""
    stride = int(sets.values.max(initial=0)) + 1
    held = np.unique(sets.row_ids() * stride + sets.values)
    rows = np.bincount(held // stride, minlength=len(sets))
    of_query = np.arange(len(sets)) if of_query is None else of_query
    return cls(Ragged((held % stride).astype(np.int32), offsets_of(rows)), np.asarray(of_query, np.int32))

  @classmethod
  def from_rows(cls, rows: Sequence[Sequence[int] | None]) -> "IdSets":
    """From a sequence of ids, or None for no set, for every query; for small inputs."""
    has = np.asarray([row is not None for row in rows], bool)
    return cls.of(Ragged.from_rows([row for row in rows if row is not None]), np.where(has, np.cumsum(has) - 1, -1))

  @property
  def has(self) -> np.ndarray:
    """bool [Q], whether a query has a set."""
    return self.of_query >= 0

  @property
  def sizes(self) -> np.ndarray:
    """int64 [Q], sizes of the queries' sets; 0 without one."""
    return np.append(self.sets.lengths, 0)[self.of_query]

  def take(self, queries: np.ndarray) -> "IdSets":
    """Of the given queries, in the given order; sets that none of them has are left out."""
    used, of_query = np.unique(self.of_query[queries], return_inverse=True)
    without = int(len(used) > 0 and used[0] < 0)
    return IdSets(self.sets.take(used[without:]), (of_query - without).astype(np.int32))

  def rows(self) -> Ragged:
    """Q rows, empty for a query without a set; shared sets are repeated."""
    padded = Ragged(self.sets.values, np.append(self.sets.offsets, self.sets.offsets[-1]))
    return padded.take(np.where(self.has, self.of_query, len(self.sets)))


@dataclasses.dataclass(frozen=True)
class Filters:
  """Which labels each of Q queries may have.

  Attributes:
    allow: the only labels that a query may have; a query without a set may have all, one with an empty set none.
      None: no query has a set.
    deny: labels that a query may not have, allowed or not.
  """

  allow: IdSets | None = None
  deny: IdSets | None = None

  def check(self, num_queries: int, num_labels: int) -> None:
    """Refuses filters that do not fit.

    Raises:
      InputError: an id is not one of a label's.
      ValueError: they are of another number of queries.
    """
    for name, part in (("allow", self.allow), ("deny", self.deny)):
      if part is None:
        continue
      if len(part) != num_queries:
        raise ValueError(f"{num_queries} queries but {len(part)} filters ({name})")
      wrong = part.sets.values[(part.sets.values < 0) | (part.sets.values >= num_labels)]
      if len(wrong):
        raise InputError(f"filter {name}: there is no label {wrong[0]}; ids go from 0 to {num_labels - 1}")

  def take(self, queries: np.ndarray) -> "Filters":
    """Of the given queries, in the given order."""
    return Filters(*(None if part is None else part.take(queries) for part in (self.allow, self.deny)))

  def permits(self, ids: np.ndarray) -> np.ndarray:
    """bool [Q, K], whether each query may have the labels found for it; False where the id is -1."""
    permitted = ids >= 0
    if self.allow is not None:
      permitted &= is_in_row(ids, self.allow.sets, self.allow.of_query) | ~self.allow.has[:, None]
    if self.deny is not None:
      permitted &= ~is_in_row(ids, self.deny.sets, self.deny.of_query)
    return permitted


def keep_permitted(scores: np.ndarray, ids: np.ndarray, permitted: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The first k of each row that are permitted, in their order; -inf and -1 where fewer are.

  Args:
    scores: [Q, K'], in descending order.
    ids: [Q, K'].
    permitted: bool [Q, K'].
    k: at most K'.
  """
  kept = np.argsort(~permitted, axis=1, kind="stable")[:, :k]
  scores, ids = np.where(permitted, scores, -np.inf), np.where(permitted, ids, -1)
  return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def search_filtered(
  index: Index, embeddings: np.ndarray, live: np.ndarray, queries: np.ndarray, k: int, filters: Filters
) -> tuple[np.ndarray, np.ndarray]:
  """The k best of the labels that each query may have.

  Let A be the live labels that a query may have. There are four ways, chosen by sizes alone:

  1. It has an allow set of at most `GATHER_AT_MOST`: A is scored, label by label, on the host. Exact with either index.
  2. It has no allow set and at most `OVERFETCH_AT_MOST` denied: `search_excluding`. At most e of the k + e best labels
     are denied, so k of them are in A; and all of A that is not among them scores no higher.
  3. Otherwise, exact index: all labels are scored on the devices and those that are not in A get -inf, for up to
     `MASKS_AT_ONCE` different sets a pass. Few denied labels do not make sets differ: they are searched for as in 2.
  4. Otherwise, ScaNN: w labels are searched for, w being twice what would do if A were spread evenly, and doubled for
     the queries for which fewer than k of A are among them. If k are, these are the k best of A that the index can
     find: it lists what it finds by score, so whatever it lists later, with any w, scores no higher.

  In 2 and 4 ScaNN may not find k of A even so, since it looks into a part of its leaves only. Then A is scored on the
  host as in 1. So a row has fewer than k labels only where A has.

  Args:
    index: over the live labels.
    embeddings: float32 [L, D], of all labels.
    live: bool [L], the labels that may be found at all.
    queries: float32 [Q, D].
    k: how many labels, at least 1.
    filters: of the Q queries.

  Returns:
    scores float32 [Q, K] in descending order and ids int32 [Q, K]; score -inf, id -1 where there are fewer.

  Raises:
    InputError: a filter names an id that is no label's.
  """
  filters.check(len(queries), len(embeddings))
  search = _Search(index, embeddings, live, queries, k, filters)
  few, plain = np.zeros(len(queries), bool), np.ones(len(queries), bool)
  if filters.allow is not None:
    few, plain = filters.allow.has & (filters.allow.sizes <= GATHER_AT_MOST), ~filters.allow.has
  if filters.deny is not None:
    plain &= filters.deny.sizes <= OVERFETCH_AT_MOST
  search.by_gathering(np.flatnonzero(few))
  search.by_overfetching(np.flatnonzero(plain))
  (search.by_masking if isinstance(index, ExactIndex) else search.by_widening)(np.flatnonzero(~few & ~plain))
  return search.scores, search.ids


class _Search:
  """One filtered search and its results so far, `scores` and `ids`.

  Queries are gone through in groups that share what they may have, up to the denied labels of queries that deny at
  most `OVERFETCH_AT_MOST`: for these so many more labels are searched for, as in way 2, and the denied ones dropped.
  """

  def __init__(
    self, index: Index, embeddings: np.ndarray, live: np.ndarray, queries: np.ndarray, k: int, filters: Filters
  ):
    self.scores = np.full((len(queries), k), -np.inf, np.float32)
    self.ids = np.full((len(queries), k), -1, np.int32)
    self._index, self._embeddings, self._live = index, embeddings, live
    self._queries, self._k, self._filters = queries, k, filters
    self._allow, self._deny = (
      IdSets.from_rows([None] * len(queries)) if part is None else part for part in (filters.allow, filters.deny)
    )
    many = self._deny.sizes > OVERFETCH_AT_MOST
    self._many_denied_of = np.where(many, self._deny.of_query, -1)
    self._few_denied = np.where(many, 0, self._deny.sizes)

  def by_gathering(self, queries: np.ndarray) -> None:
    """Way 1: what is allowed is read and scored once for all queries of a group."""
    for members in self._groups(queries):
      rows = np.flatnonzero(self._mask(members[0]))
      self._set(
        members,
        *search_rows(
          self._embeddings, rows, self._queries[members], min(self._width(members), max(len(rows), self._k))
        ),
      )

  def by_overfetching(self, queries: np.ndarray) -> None:
    """Way 2."""
    if not len(queries):
      return
    exclude = self._deny.take(queries).rows()
    self._set(queries, *search_excluding(self._index, self._queries[queries], self._k, exclude))
    if not isinstance(self._index, ExactIndex):
      self.by_gathering(self._short(queries, self._index.num_labels))

  def by_masking(self, queries: np.ndarray) -> None:
    """Way 3, for the groups of one pass together."""
    assert isinstance(self._index, ExactIndex)
    groups = self._groups(queries)
    for start in range(0, len(groups), MASKS_AT_ONCE):
      part = groups[start : start + MASKS_AT_ONCE]
      members = np.concatenate(part)
      masks = np.stack([self._mask(group[0]) for group in part])
      mask_of = np.repeat(np.arange(len(part)), [len(group) for group in part])
      self._set(members, *self._index.search(self._queries[members], self._width(members), masks, mask_of))

  def by_widening(self, queries: np.ndarray) -> None:
    """Way 4."""
    for members in self._groups(queries):
      size = int(self._mask(members[0]).sum())
      width = next_power_of_two(math.ceil(2 * self._width(members) * self._index.num_labels / max(size, 1)))
      while len(members) and width <= _WIDEST:
        self._set(members, *self._index.search(self._queries[members], width))
        members, width = self._short(members, size), 2 * width
      self.by_gathering(members)

  def _groups(self, queries: np.ndarray) -> list[np.ndarray]:
    """The queries in groups that share a mask."""
    allow, deny = self._allow.of_query, self._many_denied_of
    order = queries[np.lexsort((deny[queries], allow[queries]))]
    differs = (np.diff(allow[order]) != 0) | (np.diff(deny[order]) != 0)
    return np.split(order, np.flatnonzero(differs) + 1) if len(order) else []

  def _mask(self, query: int) -> np.ndarray:
    """bool [L], what the group of a query may have."""
    allow, many = self._allow.of_query[query], self._many_denied_of[query]
    mask = self._live.copy()
    if allow >= 0:
      allowed = self._allow.sets[allow]
      mask[:] = False
      mask[allowed] = self._live[allowed]
    if many >= 0:
      mask[self._deny.sets[many]] = False
    return mask

  def _width(self, members: np.ndarray) -> int:
    """k, and as many more as a query denies, rounded up so that few widths are compiled."""
    most = int(self._few_denied[members].max(initial=0))
    return max(self._k, min(self._k + (next_power_of_two(most) if most else 0), self._index.num_labels))

  def _short(self, queries: np.ndarray, available: int) -> np.ndarray:
    """Those of the queries for which fewer than k labels were found, where there are more."""
    return queries[(self.ids[queries] >= 0).sum(axis=1) < min(self._k, available)]

  def _set(self, members: np.ndarray, scores: np.ndarray, ids: np.ndarray) -> None:
    """Keeps the first k that the queries may have."""
    permitted = self._filters.take(members).permits(ids)
    self.scores[members], self.ids[members] = keep_permitted(scores, ids, permitted, self._k)
