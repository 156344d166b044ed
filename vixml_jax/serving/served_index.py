"""A label index that searches with few programs, all compiled before the first request."""

from collections.abc import Callable, Iterator
import functools

import jax
import numpy as np

from vixml_jax.rounding import next_power_of_two
from vixml_jax.search.filters import GATHER_AT_MOST, Filters, IdSets, keep_permitted
from vixml_jax.search.label_index import LabelIndex

_NARROWEST = 16
_STEP = 8
_LEAST_QUERIES = 8  # Exact search pads fewer to this number.


class ServedIndex(LabelIndex):
  """`LabelIndex` with the same results, and widths of exact search cut down to a handful.

  Exact search compiles a program for every number of labels that are looked for, and denied labels make that any
  number. Here it is rounded up to the next of `widths`; what is too much is cut off on the host. Allow lists that need
  a mask on the devices are searched query by query. ScaNN compiles nothing and is left as it is.
  """

  _widths: tuple[int, ...] = ()

  @functools.cached_property
  def category_names(self) -> frozenset[str]:
    """Names of all categories."""
    return frozenset(self.categories)

  def warm_up(self, k: int, queries: int, hits: int | None) -> Iterator[Callable[[], object]]:
    """What has to be called, one after the other, so that no search compiles or reads files anew.

    Args:
      k: the most labels that will be looked for, denied ones added.
      queries: the most queries at a time.
      hits: training queries that will be looked for; None for no retrieval augmentation.
    """
    yield lambda: self.filters(deny=[self.uids([0])])  # Sorts the uids' hashes.
    if hits is not None:
      yield lambda: self.query_labels
    self._widths = _widths(min(k, self.num_live))
    largest = self.filters(categories=[self.categories]) if self.categories else Filters()
    masked = largest.allow is not None and largest.allow.sizes[0] > GATHER_AT_MOST
    for count in _powers(_LEAST_QUERIES, queries):
      zeros = np.zeros((count, self.dim), np.float32)
      for width in self._widths:
        yield functools.partial(self.search, zeros, width)
      if hits is not None:
        yield functools.partial(self._search_queries, zeros, hits)
    for width in self._widths if masked else ():
      yield functools.partial(self.search, np.zeros((1, self.dim), np.float32), width, largest)

  def _search_queries(self, queries: np.ndarray, hits: int) -> None:
    self.query_index.search(queries, hits)

  def search(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """As `LabelIndex.search`."""
    if self.search_kind != "exact":
      return super().search(queries, k, filters)
    queries, filters = np.asarray(queries, np.float32), filters or Filters()
    allow = IdSets.from_rows([None] * len(queries)) if filters.allow is None else filters.allow
    few = allow.has & (allow.sizes <= GATHER_AT_MOST)
    scores, ids = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int32)
    if few.any():  # On the host, without a program.
      scores[few], ids[few] = super().search(queries[few], k, filters.take(np.flatnonzero(few)))
    for rows in (np.flatnonzero(~allow.has), *np.flatnonzero(allow.has & ~few)[:, None]):
      if len(rows):
        found = self._search_wide(queries[rows], k, filters.take(rows))
        scores[rows, : found[0].shape[1]], ids[rows, : found[1].shape[1]] = found
    return scores, ids

  def _search_wide(self, queries: np.ndarray, k: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """The k best, or all labels where these are fewer, of queries that share an allow set or have none.

    Of the k + e best, e being the most labels that a query denies, at least k are not denied.
    """
    denied = 0 if filters.deny is None else int(filters.deny.sizes.max())
    wanted = min(k + denied, self.num_live)
    width = next((width for width in self._widths if width >= wanted), wanted)
    scores, ids = super().search(queries, width, Filters(allow=filters.allow))
    return keep_permitted(scores, ids, filters.permits(ids), min(k, width))


def _widths(most: int) -> tuple[int, ...]:
  """16, 128, 1024 and so on, and `most`."""
  widths = [_NARROWEST]
  while widths[-1] * _STEP < most:
    widths.append(widths[-1] * _STEP)
  return (*(width for width in widths if width <= most // 2), most)


def _powers(least: int, most: int) -> Iterator[int]:
  """Powers of two, from `least` to the first that is no less than `most`."""
  while True:
    yield least
    if least >= next_power_of_two(most):
      return
    least *= 2
