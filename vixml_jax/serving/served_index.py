"""Search of a label index that compiles few programs, all of them before the first request."""

from collections.abc import Callable, Collection, Iterator
import functools

import jax
import numpy as np

from vixml_jax.search.exact import padded_queries
from vixml_jax.search.filters import GATHER_AT_MOST, Filters, IdSets, keep_permitted
from vixml_jax.search.label_index import LabelIndex

_NARROWEST = 16
_STEP = 8


class ServedIndex:
  """Searches a `LabelIndex` with the same results, and with few widths of exact search.

  Exact search compiles a program for every number of labels to find, and denied labels make that any number. This class
  rounds the number up to one of a few widths and drops the surplus on the host. Allow lists that need a mask on the
  devices are searched query by query. ScaNN compiles nothing and is used as it is.

  Attributes:
    labels: The label index.
    num_live: Number of labels that are not deleted.
  """

  def __init__(self, labels: LabelIndex):
    self.labels = labels
    self.num_live = labels.num_live
    self._widths: tuple[int, ...] = ()

  def open_parts(self, hits: Collection[int] = ()) -> None:
    """Reads everything that a search needs, so that no search reads a new file.

    Args:
      hits: Numbers of training queries that the rankings look up; empty if none looks up any.
    """
    labels = self.labels
    labels.filters(deny=[labels.uids([0])])  # Sorts the hashes of the uids.
    _ = labels.label_index
    if hits:
      _ = labels.query_index, labels.query_labels

  def warm_up(self, k: int, queries: int, hits: Collection[int] = ()) -> Iterator[Callable[[], object]]:
    """Yields functions to call, in any order, after `open_parts`; after that no search compiles a program.

    Args:
      k: Maximum number of labels that a search finds, denied ones included.
      queries: Maximum number of queries in a search.
      hits: Numbers of training queries that the rankings look up.
    """
    labels = self.labels
    self._widths = _widths(min(k, self.num_live))
    largest = labels.filters(categories=[labels.categories]) if labels.categories else Filters()
    masked = largest.allow is not None and largest.allow.sizes[0] > GATHER_AT_MOST
    for count in sorted({padded_queries(number) for number in range(1, queries + 1)}):
      zeros = np.zeros((count, labels.dim), np.float32)
      for number in hits:
        yield functools.partial(self._search_queries, zeros, number)
      for width in self._widths:
        yield functools.partial(self.search, zeros, width)
    for width in self._widths if masked else ():
      yield functools.partial(self.search, np.zeros((1, labels.dim), np.float32), width, largest)

  def _search_queries(self, queries: np.ndarray, hits: int) -> None:
    self.labels.query_index.search(queries, hits)

  def search(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `LabelIndex.search` returns."""
    if self.labels.search_kind != "exact":
      return self.labels.search(queries, k, filters)
    if filters is None and self._width(k) >= k:
      scores, ids = self.labels.search(queries, self._width(k))
      return scores[:, :k], ids[:, :k]
    queries, filters = np.asarray(queries, np.float32), filters or Filters()
    allow = IdSets.from_rows([None] * len(queries)) if filters.allow is None else filters.allow
    few = allow.has_set & (allow.sizes <= GATHER_AT_MOST)
    scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int32)
    if few.any():  # On the host, without a program.
      scores[few], ids[few] = self.labels.search(queries[few], k, filters.take(np.flatnonzero(few)))
    for rows in (np.flatnonzero(~allow.has_set), *np.flatnonzero(allow.has_set & ~few)[:, None]):
      if len(rows):
        found = self._search_wide(queries[rows], k, filters.take(rows))
        scores[rows, : found[0].shape[1]], ids[rows, : found[1].shape[1]] = found
    return scores, ids

  def _search_wide(self, queries: np.ndarray, k: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best labels, or all if there are fewer, of queries that share an allow set or have none.

    At least k of the k + e best labels are not denied, where e is the largest number of labels that a query denies.
    """
    denied = 0 if filters.deny is None else int(filters.deny.sizes.max())
    width = self._width(k + denied)
    scores, ids = self.labels.search(queries, width, Filters(allow=filters.allow))
    return keep_permitted(scores, ids, filters.permits(ids), min(k, width))

  def _width(self, needed: int) -> int:
    """Returns the number of labels to search for, so that at least `needed` are found, or all."""
    needed = min(needed, self.num_live)
    return next((width for width in self._widths if width >= needed), needed)


def _widths(most: int) -> tuple[int, ...]:
  """Returns 16, 128, 1024 and so on, and `most`."""
  widths = [_NARROWEST]
  while widths[-1] * _STEP < most:
    widths.append(widths[-1] * _STEP)
  return (*(width for width in widths if width <= most // 2), most)
