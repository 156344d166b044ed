"""Candidates of the blend: the union of the best labels by prototype, by neighbors' votes and by words.

A pair of a query and a label is one number, `query * L + label`, its key. What each source knows about pairs is a table
with ascending keys, so that unions and look-ups are sorts and binary searches over arrays, without a loop over pairs.
"""

import dataclasses

import numpy as np

from vixml_jax.ragged import Ragged, padded, ranges
from vixml_jax.search.filters import Filters
from vixml_jax.search.membership import is_in_row
from vixml_jax.search.retrieval_augmented import Neighbors

SHARP_TEMPERATURE, SMOOTH_TEMPERATURE = 0.02, 0.1
"""Temperatures of the two votes of neighbors in the embedding."""


@dataclasses.dataclass(frozen=True)
class BlendWidths:
  """How many results of each source become candidates.

  Attributes:
    labels: Labels by prototype.
    queries: Training queries that vote, by embedding.
    voted: Labels by the votes of these.
    lexical_labels: Labels by words.
    lexical_queries: Training queries that vote, by words.
    lexical_voted: Labels by the votes of these.
  """

  labels: int = 120
  queries: int = 100
  voted: int = 100
  lexical_labels: int = 40
  lexical_queries: int = 100
  lexical_voted: int = 50


DEFAULT_WIDTHS = BlendWidths()


@dataclasses.dataclass(frozen=True)
class PairTable:
  """Values of pairs of a query and a label.

  Attributes:
    keys: int64 [P], ascending and distinct.
    values: float32 [P, V].
  """

  keys: np.ndarray
  values: np.ndarray

  def look_up(self, keys: np.ndarray, missing: float) -> np.ndarray:
    """Returns the values of other keys, float32 [P', V]; `missing` for keys that the table lacks."""
    found = np.full((len(keys), self.values.shape[1]), missing, np.float32)
    if len(self.keys):
      places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
      known = self.keys[places] == keys
      found[known] = self.values[places[known]]
    return found

  def top(self, count: int, column: int, num_labels: int) -> np.ndarray:
    """Returns the keys of the `count` pairs of each query that are greatest in a column, the lower id among equals."""
    queries = self.keys // num_labels
    order = np.lexsort((self.keys, -self.values[:, column], queries))
    ranks = ranges(0, np.bincount(queries)) if len(queries) else queries
    return self.keys[order[ranks < count]]


@dataclasses.dataclass(frozen=True)
class Sources:
  """What is known about the pairs of a block of Q queries.

  Attributes:
    labels: Scores and rank (from 0) by prototype: columns `score`, `rank`.
    votes: Votes of neighbors in the embedding: columns sharp vote, smooth vote, similarity of the best voter.
    lexical_labels: Scores by words: column `score`.
    lexical_votes: Votes of neighbors by words: columns vote, similarity of the best voter.
    best_label: float32 [Q], score of the best label by prototype.
    best_query: float32 [Q], similarity of the nearest training query in the embedding.
    num_labels: L.
  """

  labels: PairTable
  votes: PairTable
  lexical_labels: PairTable
  lexical_votes: PairTable
  best_label: np.ndarray
  best_query: np.ndarray
  num_labels: int


def sources_of(found: Neighbors, lexical: Neighbors, labels_of_queries: Ragged, num_labels: int) -> Sources:
  """Returns what both searches of Q queries say about labels.

  Args:
    found: Labels and training queries by embedding.
    lexical: Labels and training queries by words.
    labels_of_queries: Labels of the N training queries, each at most once a row.
    num_labels: L.
  """
  ranks = np.broadcast_to(np.arange(found.label_ids.shape[1], dtype=np.float32), found.label_ids.shape)
  soft = [_softmax(found.query_scores, temperature) for temperature in (SHARP_TEMPERATURE, SMOOTH_TEMPERATURE)]
  shares = np.where(lexical.query_ids >= 0, lexical.query_scores, 0)
  shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-9)
  return Sources(
    labels=_table(found.label_ids, (found.label_scores, ranks), num_labels),
    votes=_votes(found.query_ids, found.query_scores, soft, labels_of_queries, num_labels),
    lexical_labels=_table(lexical.label_ids, (lexical.label_scores,), num_labels),
    lexical_votes=_votes(lexical.query_ids, lexical.query_scores, [shares], labels_of_queries, num_labels),
    best_label=found.label_scores.max(axis=1, initial=-np.inf),
    best_query=found.query_scores.max(axis=1, initial=-np.inf),
    num_labels=num_labels,
  )


def candidates_of(
  sources: Sources, widths: BlendWidths, *, exclude: Ragged | None = None, filters: Filters | None = None
) -> Ragged:
  """Returns the candidates of each query, ascending ids, Q rows: those of any source that the query may have.

  Args:
    sources: What is known about labels.
    widths: How many results of each source to take.
    exclude: Labels to leave out for each query, Q rows.
    filters: Labels that each query may have. A search by prototype that applied them too finds enough of these.
  """
  num_labels, num_queries = sources.num_labels, len(sources.best_label)
  keys = np.unique(
    np.concatenate(
      [
        sources.labels.keys,
        sources.votes.top(widths.voted, 1, num_labels),
        sources.lexical_labels.keys,
        sources.lexical_votes.top(widths.lexical_voted, 0, num_labels),
      ]
    )
  )
  queries, ids = np.divmod(keys, num_labels)
  candidates = Ragged.of_lengths(ids.astype(np.int32), np.bincount(queries, minlength=num_queries))
  if exclude is None and filters is None:
    return candidates
  rows = padded(candidates, candidates.values, -1)
  permitted = rows >= 0
  if exclude is not None:
    permitted &= ~is_in_row(rows, exclude)
  if filters is not None:
    permitted &= filters.permits(rows)
  return Ragged.of_lengths(rows[permitted], permitted.sum(axis=1))


def positives_of(candidates: Ragged, labels: Ragged) -> np.ndarray:
  """Returns whether each candidate is among the labels of its query, bool [P]; both have Q rows."""
  return is_in_row(candidates.values[:, None], labels, candidates.row_ids())[:, 0]


def keys_of(candidates: Ragged, num_labels: int) -> np.ndarray:
  """Returns the key of each candidate, int64 [P], ascending."""
  return candidates.row_ids() * num_labels + candidates.values


def _table(ids: np.ndarray, columns: tuple[np.ndarray, ...], num_labels: int) -> PairTable:
  """Returns the table of dense results [Q, K], whose ids are distinct; id -1 marks empty places."""
  queries, places = np.nonzero(ids >= 0)
  keys = queries * num_labels + ids[queries, places]
  order = np.argsort(keys)
  return PairTable(keys[order], np.stack([column[queries, places][order] for column in columns], 1).astype(np.float32))


def _votes(
  ids: np.ndarray, similarities: np.ndarray, weights: list[np.ndarray], labels_of_queries: Ragged, num_labels: int
) -> PairTable:
  """Returns the sum of each kind of weights over the neighbors that have a label, and the similarity of the best one.

  Args:
    ids: Training queries found, int32 [Q, K'].
    similarities: Their similarities, float32 [Q, K'].
    weights: Weights of each kind, [Q, K'].
    labels_of_queries: Labels of the N training queries.
    num_labels: L.
  """
  queries, places = np.nonzero(ids >= 0)
  labels = labels_of_queries.take(ids[queries, places])
  voter = labels.row_ids()
  keys = queries[voter] * num_labels + labels.values
  order = np.argsort(keys, kind="stable")
  keys, voter = keys[order], voter[order]
  starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.int64)
  if not len(starts):
    return PairTable(keys, np.zeros((0, len(weights) + 1), np.float32))
  columns = [np.add.reduceat(weight[queries, places].astype(np.float64)[voter], starts) for weight in weights]
  columns.append(np.maximum.reduceat(similarities[queries, places][voter], starts))
  return PairTable(keys[starts], np.stack(columns, axis=1).astype(np.float32))


def _softmax(scores: np.ndarray, temperature: float) -> np.ndarray:
  """Returns the softmax of each row in float64; a score of -inf has no mass."""
  highest = scores.max(axis=1, keepdims=True, initial=-np.inf)
  mass = np.exp((scores - np.where(np.isfinite(highest), highest, 0)).astype(np.float64) / temperature)
  return mass / np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
