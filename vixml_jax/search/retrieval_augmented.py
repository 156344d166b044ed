"""Retrieval-augmented inference: ranks labels by their prototypes and by similar training queries together.

ViXML (arXiv 2511.13189), "Retrieval-augmented inference". A query searches the labels and the training queries for its
nearest neighbors. One softmax over the scores of both turns them into mass, and each label of a training query gets the
full mass of that query:

  score(l) = lambda * mass(l) + (1 - lambda) * sum of mass(n) over neighbors n that have label l

The searches depend on neither lambda nor the temperature, so trying other values of both is cheap.

The published code has two ways to choose the neighbors. Its default searches labels and training queries together: the
500 nearest of both ("joint"). Its split mode takes the 500 nearest labels and the 50 nearest training queries
("separate").
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import numpy as np
import scipy.sparse

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged, offsets_of
from vixml_jax.search.filters import Filters
from vixml_jax.search.host_search import top_k_positions
from vixml_jax.search.index import Index, search_excluding
from vixml_jax.search.membership import drop_members

HITS = 100
QUERIES_PER_BLOCK = 2048


@dataclasses.dataclass(frozen=True)
class RetrievalSettings:
  """Settings of retrieval-augmented inference.

  Attributes:
    lambda_: Weight of the labels' own mass, 0 to 1; that of the training queries is 1 - lambda_.
    temperature: Divisor of the scores before the softmax, above 0.
    hits: Number of labels that each query retrieves; with `joint`, of labels and training queries together.
    query_hits: Number of training queries that each query retrieves; 0 for as many as labels. Ignored with `joint`.
    joint: Whether labels and training queries compete for the same places.
  """

  lambda_: float
  temperature: float
  hits: int
  query_hits: int = 0
  joint: bool = False

  @property
  def num_query_hits(self) -> int:
    """Number of training queries to search for."""
    return self.hits if self.joint or not self.query_hits else self.query_hits

  def kept(self, found: "Neighbors") -> "Neighbors":
    """Returns the neighbors that count: with `joint`, the `hits` nearest of both searches; else all."""
    return found.nearest(self.hits) if self.joint else found

  def as_json(self) -> dict[str, Any]:
    """Returns the settings as index.json has them."""
    return {
      "lambda": self.lambda_,
      "temperature": self.temperature,
      "hits": self.hits,
      "query_hits": self.num_query_hits,
      "joint": self.joint,
    }

  @classmethod
  def from_json(cls, stored: dict[str, Any]) -> "RetrievalSettings":
    """Reads what `as_json` has written, or an older version without `query_hits` and `joint`."""
    return cls(
      stored["lambda"],
      stored["temperature"],
      stored["hits"],
      stored.get("query_hits", stored["hits"]),
      stored.get("joint", False),
    )


@dataclasses.dataclass(frozen=True)
class Neighbors:
  """Results of both searches for Q queries, in descending order of score; id -1 and score -inf mark empty places.

  Attributes:
    label_scores: float32 [Q, K], scores of the labels found.
    label_ids: int32 [Q, K], ids of the labels found.
    query_scores: float32 [Q, K'], scores of the training queries found.
    query_ids: int32 [Q, K'], ids of the training queries found.
  """

  label_scores: np.ndarray
  label_ids: np.ndarray
  query_scores: np.ndarray
  query_ids: np.ndarray

  def first(self, label_hits: int, query_hits: int) -> "Neighbors":
    """Returns the first labels and the first training queries of each query."""
    return Neighbors(
      self.label_scores[:, :label_hits],
      self.label_ids[:, :label_hits],
      self.query_scores[:, :query_hits],
      self.query_ids[:, :query_hits],
    )

  def without(self, exclude: Ragged) -> "Neighbors":
    """Returns the neighbors without the labels that a query must not have, Q rows; the places at the end are empty."""
    width = self.label_ids.shape[1]
    return Neighbors(
      *drop_members(self.label_scores, self.label_ids, exclude, width), self.query_scores, self.query_ids
    )

  @classmethod
  def concatenate(cls, parts: Sequence["Neighbors"]) -> "Neighbors":
    """Joins the neighbors of several blocks of queries."""
    names = [field.name for field in dataclasses.fields(cls)]
    return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

  def take(self, rows: np.ndarray) -> "Neighbors":
    """Returns the neighbors of some of the queries, int [rows]."""
    return Neighbors(self.label_scores[rows], self.label_ids[rows], self.query_scores[rows], self.query_ids[rows])

  def nearest(self, hits: int, rows: np.ndarray | None = None) -> "Neighbors":
    """Returns the neighbors among the `hits` nearest labels and training queries of each query, taken together.

    The other places become empty. Among equal scores, labels come first.

    Args:
      hits: Number of neighbors to keep.
      rows: bool [Q], the queries that this applies to; the others keep all neighbors. None for all queries.
    """
    joined = np.concatenate([self.label_scores, self.query_scores], axis=1)
    kept = np.zeros(joined.shape, bool)
    np.put_along_axis(kept, top_k_positions(joined, min(hits, joined.shape[1])), True, axis=1)
    if rows is not None:
      kept |= ~rows[:, None]
    scores = np.where(kept, joined, -np.inf)
    ids = np.where(kept, np.concatenate([self.label_ids, self.query_ids], axis=1), -1)
    split = self.label_ids.shape[1]
    return Neighbors(scores[:, :split], ids[:, :split], scores[:, split:], ids[:, split:])


def search_both(
  label_index: Index,
  query_index: Index,
  queries: np.ndarray | jax.Array,
  *,
  label_hits: int = HITS,
  query_hits: int = HITS,
  exclude_queries: Ragged | None = None,
) -> Neighbors:
  """Returns the nearest labels and the nearest training queries of each query.

  Args:
    label_index: Index of the labels' prototypes, [L, D].
    query_index: Index of the training queries' embeddings, [N, D].
    queries: Queries [Q, D] of unit length, so that scores are cosines.
    label_hits: K, the number of labels to find for each query.
    query_hits: K', the number of training queries to find for each query.
    exclude_queries: Training queries that each query must not find (itself, for example), Q rows.
  """
  labels = search_excluding(label_index, queries, label_hits, None)
  return Neighbors(*labels, *search_excluding(query_index, queries, query_hits, exclude_queries))


def combine(
  neighbors: Neighbors,
  labels_of_queries: Ragged,
  *,
  num_labels: int,
  lambda_: float,
  temperature: float,
  k: int,
  exclude: Ragged | None = None,
  filters: Filters | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k labels of highest score for each query, computed from its neighbors.

  Excluded labels take part in the softmax, as in the published code. They are dropped before the cut at k, while the
  published code drops them after it. A label without mass is not ranked.

  The computation runs on the host with sparse matrices, on blocks of 2,048 queries: no array is [Q, L] or [Q, N].

  Args:
    neighbors: Neighbors of Q queries.
    labels_of_queries: Labels of the N training queries, each at most once a row.
    num_labels: Number of labels L.
    lambda_: Weight of the labels' own mass, 0 to 1.
    temperature: Divisor of the scores before the softmax, above 0.
    k: Number of labels to return for each query.
    exclude: Labels to leave out for each query, Q rows.
    filters: Labels that each query may have. If the label search applied the same filters (as `LabelIndex.search`
      does), a query finds up to K permitted labels, however few are permitted.

  Returns:
    Scores float32 [Q, K] in descending order and ids int32 [Q, K], the lower id first among equal scores. Score -inf
    and id -1 fill the places of a query for which fewer labels have mass.

  Raises:
    InputError: `lambda_` or `temperature` is out of range.
  """
  check_setting(lambda_, temperature)
  num_queries = len(neighbors.label_ids)
  scores = np.empty((num_queries, k), np.float32)
  ids = np.empty((num_queries, k), np.int32)
  for start in range(0, num_queries, QUERIES_PER_BLOCK):
    rows = slice(start, min(start + QUERIES_PER_BLOCK, num_queries))
    label_mass, query_mass = _softmax(neighbors.label_scores[rows], neighbors.query_scores[rows], temperature)
    mass = _mass_of_labels(
      lambda_ * label_mass,
      neighbors.label_ids[rows],
      (1 - lambda_) * query_mass,
      neighbors.query_ids[rows],
      labels_of_queries,
      num_labels,
    )
    block_exclude = None if exclude is None else exclude.take(np.arange(rows.start, rows.stop))
    block_filters = None if filters is None else filters.take(np.arange(rows.start, rows.stop))
    scores[rows], ids[rows] = _rank(mass, k, block_exclude, block_filters)
  return scores, ids


def check_setting(lambda_: float, temperature: float) -> None:
  """Checks lambda and the temperature.

  Raises:
    InputError: One of them is out of range.
  """
  if not 0 <= lambda_ <= 1:
    raise InputError(f"lambda of retrieval-augmented inference is {lambda_}: it must be between 0 and 1")
  if not temperature > 0:
    raise InputError(f"temperature of retrieval-augmented inference is {temperature}: it must be above 0")


def _softmax(label_scores: np.ndarray, query_scores: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the softmax over both lists of scores together, in float64; a score of -inf has no mass."""
  joined = np.concatenate([label_scores, query_scores], axis=1).astype(np.float64)
  highest = joined.max(axis=1, keepdims=True)
  mass = np.exp((joined - np.where(np.isfinite(highest), highest, 0)) / temperature)
  mass /= np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
  return mass[:, : label_scores.shape[1]], mass[:, label_scores.shape[1] :]


def _mass_of_labels(
  label_mass: np.ndarray,
  label_ids: np.ndarray,
  query_mass: np.ndarray,
  query_ids: np.ndarray,
  labels_of_queries: Ragged,
  num_labels: int,
) -> scipy.sparse.csr_array:
  """Returns a sparse [Q, L] matrix: the mass of each label plus that of the training queries that have it.

  It is one product of sparse matrices, [Q, hits] @ [hits, L], where the hits are the distinct labels and training
  queries that were found. The only label of a label hit is the label itself.
  """
  found_labels, label_columns = _distinct_hits(label_ids)
  found_queries, query_columns = _distinct_hits(query_ids)
  labels = labels_of_queries.take(found_queries)
  has_label = scipy.sparse.csr_array(
    (
      np.ones(len(found_labels) + len(labels.values)),
      np.concatenate([found_labels, labels.values]),
      np.concatenate([np.arange(len(found_labels)), len(found_labels) + labels.offsets]),
    ),
    shape=(len(found_labels) + len(found_queries), num_labels),
  )
  query_columns = np.where(query_columns < 0, -1, len(found_labels) + query_columns)
  mass = np.concatenate([label_mass, query_mass], axis=1)
  columns = np.concatenate([label_columns, query_columns], axis=1)
  kept = (columns >= 0) & (mass > 0)
  offsets = offsets_of(kept.sum(axis=1))
  shape = (len(mass), len(found_labels) + len(found_queries))
  return scipy.sparse.csr_array((mass[kept], columns[kept], offsets), shape=shape) @ has_label


def _distinct_hits(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the distinct ids, ascending, and the position of each given id among them; -1 for an empty place."""
  distinct, positions = np.unique(np.maximum(ids, 0), return_inverse=True)
  return distinct, np.where(ids < 0, -1, positions.reshape(ids.shape))


def _rank(
  mass: scipy.sparse.csr_array, k: int, exclude: Ragged | None, filters: Filters | None
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k greatest values of each sparse row, without excluded columns and those that the filters forbid."""
  mass.sort_indices()
  lengths = np.diff(mass.indptr)
  # As many more as can be excluded, so that k remain: see search_excluding.
  width = k if exclude is None else k + int(exclude.lengths.max(initial=0))
  places = np.arange(max(width, int(lengths.max(initial=0)))) < lengths[:, None]
  ids = np.full(places.shape, -1, np.int32)
  scores = np.full(places.shape, -np.inf)
  ids[places], scores[places] = mass.indices, mass.data
  if filters is not None:
    permitted = filters.permits(ids)
    ids, scores = np.where(permitted, ids, -1), np.where(permitted, scores, -np.inf)
  kept = top_k_positions(scores, width)
  scores, ids = np.take_along_axis(scores, kept, axis=1), np.take_along_axis(ids, kept, axis=1)
  if exclude is not None:
    scores, ids = drop_members(scores, ids, exclude, k)
  return scores.astype(np.float32), ids
