"""Exact search on the host over a small part of the labels."""

import numpy as np

from vixml_jax.search.prefixes import ScaledPrefixes

LABELS_PER_BLOCK = 65_536
QUERIES_PER_BLOCK = 512


def search_rows(
  embeddings: np.ndarray | ScaledPrefixes, rows: np.ndarray, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k labels of highest inner product among the given ones.

  Args:
    embeddings: Label embeddings float32 [L, D], memory-mapped or not; only the given rows are read.
    rows: Ids of the labels to search, ascending.
    queries: Queries float32 [Q, D].
    k: Number of labels to return for each query, at least 1.

  Returns:
    Scores float32 [Q, K] in descending order and ids int32 [Q, K], the lower id first among equal scores. Score -inf
    and id -1 fill the places beyond the number of labels searched.
  """
  scores = np.full((len(queries), k), -np.inf, np.float32)
  ids = np.full((len(queries), k), -1, np.int32)
  for label_start in range(0, len(rows), LABELS_PER_BLOCK):
    block = rows[label_start : label_start + LABELS_PER_BLOCK]
    labels = np.asarray(embeddings[block], np.float32).T
    for query_start in range(0, len(queries), QUERIES_PER_BLOCK):
      part = slice(query_start, query_start + QUERIES_PER_BLOCK)
      block_scores = queries[part] @ labels
      # The results so far come first because their ids are lower: they win ties.
      joined = np.concatenate([scores[part], block_scores], axis=1)
      best = top_k_positions(joined, k)
      block_ids = np.broadcast_to(block.astype(np.int32), block_scores.shape)
      ids[part] = np.take_along_axis(np.concatenate([ids[part], block_ids], axis=1), best, axis=1)
      scores[part] = np.take_along_axis(joined, best, axis=1)
  return scores, ids


def top_k_positions(scores: np.ndarray, k: int) -> np.ndarray:
  """Returns the positions [Q, k] of the k greatest values in descending order, the first ones among equal values.

  Equal values are common (all labels of one neighbor, for example). `np.partition` alone would choose among them
  arbitrarily, and a stable sort of whole rows takes several times as long.

  Args:
    scores: Scores [Q, W].
    k: Number of positions, at most W.
  """
  threshold = np.partition(scores, scores.shape[1] - k, axis=1)[:, [scores.shape[1] - k]]
  above = scores > threshold
  level = scores == threshold
  level &= level.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)
  positions = np.nonzero(above | level)[1].reshape(len(scores), k)
  order = np.argsort(-np.take_along_axis(scores, positions, axis=1), axis=1, kind="stable")
  return np.take_along_axis(positions, order, axis=1)
