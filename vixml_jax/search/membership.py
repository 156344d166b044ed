"""Membership of retrieved ids in a row of ids for each query: tests it, drops members, and counts them."""

import numpy as np

from vixml_jax.ragged import Ragged


def is_in_row(ids: np.ndarray, rows: Ragged, row_of_query: np.ndarray | None = None) -> np.ndarray:
  """Returns bool [Q, K], whether each id is in its query's row.

  >>> is_in_row(np.asarray([[4, 7], [4, -1]]), Ragged.from_rows([[7, 2], [4]]))
  array([[False,  True],
         [ True, False]])

  It needs about 17 bytes of memory per id, so callers with millions of queries call it on chunks of them.

  Args:
    ids: Integers [Q, K]; negative ids mark empty places, which are in no row.
    rows: Non-negative ids in any order, one row for each query unless `row_of_query` is given.
    row_of_query: The row of each query [Q], -1 for none; None if row i belongs to query i.
  """
  if row_of_query is None:
    if len(ids) != len(rows):
      raise ValueError(f"{len(ids)} rows of ids but {len(rows)} rows to look them up in")
    row_of_query = np.arange(len(ids))
  if ids.size == 0 or len(rows.values) == 0:
    return np.zeros(ids.shape, bool)
  # Row and id in one number: each row has a range of numbers of its own.
  stride = max(int(ids.max()), int(rows.values.max())) + 1
  members = np.sort(rows.row_ids() * stride + rows.values)
  wanted = np.asarray(row_of_query, np.int64)[:, None] * stride + ids  # Negative without a row: equal to no member.
  places = np.minimum(np.searchsorted(members, wanted), len(members) - 1)
  return np.asarray((members[places] == wanted) & (ids >= 0))


def drop_members(scores: np.ndarray, ids: np.ndarray, rows: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first k results of each query that are not in its row.

  Args:
    scores: Scores [Q, K'], in descending order.
    ids: Ids [Q, K']; -1 marks an empty place.
    rows: Ids to drop, Q rows.
    k: Number of results to keep, at most K'.

  Returns:
    Scores [Q, K] and ids [Q, K] in their former order; -inf and -1 fill the places of a query with fewer results left.
  """
  dropped = is_in_row(ids, rows)
  kept = np.argsort(dropped, axis=1, kind="stable")[:, :k]  # A stable sort moves dropped results to the end.
  scores, ids = np.where(dropped, -np.inf, scores), np.where(dropped, -1, ids)
  return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the share of the wanted ids that were found, over all queries (a micro-averaged recall).

  >>> overlap(found=np.asarray([[1, 2], [5, 6]]), wanted=np.asarray([[2, 3], [5, -1]]))
  0.6666666666666666

  Args:
    found: Ids [Q, K'].
    wanted: Ids [Q, K]; negative ids mark empty places and do not count.
  """
  hits, total = overlap_counts(found, wanted)
  return hits / max(total, 1)


def overlap_counts(found: np.ndarray, wanted: np.ndarray) -> tuple[int, int]:
  """Returns how many wanted ids were found, and how many there are; arguments as for `overlap`."""
  hits = [np.isin(row, got) & (row >= 0) for row, got in zip(wanted, found, strict=True)]
  return int(np.sum(hits)), int(np.sum(wanted >= 0))
