"""Compares retrieved ids with those in their query's row: finds those that stand there, drops or counts them."""

import numpy as np

from vixml_jax.ragged import Ragged


def is_in_row(ids: np.ndarray, rows: Ragged, row_of: np.ndarray | None = None) -> np.ndarray:
  """For every id whether it stands in its query's row.

  Needs memory for about 17 bytes an id, so callers with millions of queries
  go through them in chunks.

  Args:
    ids: integers [Q, K]; negative ids mark places without a result.
    rows: non-negative ids in any order, a row for each query, or as `row_of` says.
    row_of: the row of each query, [Q], -1 for none; None where the rows are the queries'.

  Returns:
    bool [Q, K]; False where the id is negative, or its query has no row.
  """
  if row_of is None:
    if len(ids) != len(rows):
      raise ValueError(f"{len(ids)} rows of ids but {len(rows)} rows to look them up in")
    row_of = np.arange(len(ids))
  if ids.size == 0 or len(rows.values) == 0:
    return np.zeros(ids.shape, bool)
  # Row and id in one number: a row's ids then lie in a range of their own.
  stride = max(int(ids.max()), int(rows.values.max())) + 1
  held = np.sort(rows.row_ids() * stride + rows.values)
  wanted = np.asarray(row_of, np.int64)[:, None] * stride + ids  # negative where there is no row: held by none
  places = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
  return (held[places] == wanted) & (ids >= 0)


def drop_members(scores: np.ndarray, ids: np.ndarray, rows: Ragged, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The first k results of each query that do not stand in its row.

  Args:
    scores: [Q, K'], in descending order.
    ids: [Q, K']; -1 marks places without a result.
    rows: ids to leave out, Q rows.
    k: how many to keep, at most K'.

  Returns:
    scores [Q, K] and ids [Q, K] in their former order; -inf and -1 where fewer are left.
  """
  dropped = is_in_row(ids, rows)
  kept = np.argsort(dropped, axis=1, kind="stable")[:, :k]  # the others first, in their order
  scores, ids = np.where(dropped, -np.inf, scores), np.where(dropped, -1, ids)
  return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
  """Mean share of the wanted ids [Q, K] that are among the found ones [Q, K], of those that exist."""
  hits = [np.isin(row, got, assume_unique=False) & (row >= 0) for row, got in zip(wanted, found, strict=True)]
  return float(np.sum(hits) / max(np.sum(wanted >= 0), 1))
