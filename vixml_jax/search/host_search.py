"""Exact scores of some of the labels, on the host: few labels of many need no device."""

import numpy as np

_LABELS_AT_ONCE = 65_536
_QUERIES_AT_ONCE = 512


def search_rows(embeddings: np.ndarray, rows: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k labels of highest inner product among the given ones.

  Args:
    embeddings: float32 [L, D], memory-mapped or not; only the given rows are read.
    rows: ascending label ids.
    queries: float32 [Q, D].
    k: how many labels, at least 1.

  Returns:
    scores float32 [Q, K] in descending order and ids int32 [Q, K], the lower id first where scores are equal; score
    -inf and id -1 where there are fewer.
  """
  scores = np.full((len(queries), k), -np.inf, np.float32)
  ids = np.full((len(queries), k), -1, np.int32)
  for start in range(0, len(rows), _LABELS_AT_ONCE):
    block = rows[start : start + _LABELS_AT_ONCE]
    labels = np.asarray(embeddings[block], np.float32).T
    for first in range(0, len(queries), _QUERIES_AT_ONCE):
      part = slice(first, first + _QUERIES_AT_ONCE)
      found = queries[part] @ labels
      # What was found before has the lower ids and stands first, so it wins ties.
      joined = np.concatenate([scores[part], found], axis=1)
      best = greatest(joined, k)
      own = np.broadcast_to(block.astype(np.int32), found.shape)
      ids[part] = np.take_along_axis(np.concatenate([ids[part], own], axis=1), best, axis=1)
      scores[part] = np.take_along_axis(joined, best, axis=1)
  return scores, ids


def greatest(scores: np.ndarray, k: int) -> np.ndarray:
  """Positions [Q, k] of the k greatest values in descending order, the first ones where values are equal.

  Equal values are common (all labels of one neighbor, say), so a partition alone would choose among them at random;
  and a stable sort of whole rows takes several times as long.

  Args:
    scores: [Q, W].
    k: at most W.
  """
  threshold = np.partition(scores, scores.shape[1] - k, axis=1)[:, [scores.shape[1] - k]]
  above = scores > threshold
  level = scores == threshold
  level &= level.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)
  positions = np.nonzero(above | level)[1].reshape(len(scores), k)
  order = np.argsort(-np.take_along_axis(scores, positions, axis=1), axis=1, kind="stable")
  return np.take_along_axis(positions, order, axis=1)
