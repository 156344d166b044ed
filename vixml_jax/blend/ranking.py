"""The trained blend: finds candidates of queries, scores them and ranks them."""

from collections.abc import Callable
import dataclasses

import numpy as np
import scipy.sparse

from vixml_jax.blend.candidates import DEFAULT_WIDTHS, BlendWidths, Sources, candidates_of, sources_of
from vixml_jax.blend.classifiers import candidate_scores
from vixml_jax.blend.features import candidate_features, classifier_features
from vixml_jax.blend.lexical import LexicalIndex
from vixml_jax.blend.model import BlendModel, dial_scores
from vixml_jax.ragged import Ragged, padded
from vixml_jax.search.filters import Filters
from vixml_jax.search.host_search import top_k_positions
from vixml_jax.search.retrieval_augmented import Neighbors

QUERIES_PER_BLOCK = 1024
"""Number of queries whose candidates are described at a time."""


@dataclasses.dataclass(frozen=True)
class BlendIndex:
  """What the blend knows about labels and training queries beside their embeddings.

  Attributes:
    labels: TF-IDF of the labels' texts.
    queries: TF-IDF of the training queries' texts.
    labels_of_queries: Labels of the N training queries, each at most once a row.
    frequencies: Number of training queries of each label, int64 [L].
    widths: How many results of each source become candidates.
    classifiers_of: Function of label ids [M] that returns their classifiers [M, D + 1], with NaN for labels without
      one; None if no label has one.
  """

  labels: LexicalIndex
  queries: LexicalIndex
  labels_of_queries: Ragged
  frequencies: np.ndarray
  widths: BlendWidths = DEFAULT_WIDTHS
  classifiers_of: Callable[[np.ndarray], np.ndarray] | None = None

  @classmethod
  def build(
    cls,
    label_vectors: scipy.sparse.csr_array,
    query_vectors: scipy.sparse.csr_array,
    labels_of_queries: Ragged,
    widths: BlendWidths = DEFAULT_WIDTHS,
    classifiers_of: Callable[[np.ndarray], np.ndarray] | None = None,
  ) -> "BlendIndex":
    """Returns the index of label vectors [L, F] and training-query vectors [N, F].

    A training query that must not be found has a zero vector and no labels.
    """
    return cls(
      LexicalIndex.build(label_vectors),
      LexicalIndex.build(query_vectors),
      labels_of_queries,
      np.bincount(labels_of_queries.values, minlength=label_vectors.shape[0]),
      widths,
      classifiers_of,
    )

  def described(
    self,
    embeddings: np.ndarray,
    found: Neighbors,
    vectors: scipy.sparse.csr_array,
    *,
    exclude: Ragged | None = None,
    filters: Filters | None = None,
  ) -> tuple[Ragged, np.ndarray]:
    """Returns the candidates of Q queries, Q rows with P labels in total, and their features float32 [P, V].

    Args:
      embeddings: Embeddings of the queries [Q, D], which are read only if labels have classifiers.
      found: Labels and training queries by embedding, at least as many as `widths` asks for when the excluded labels
        are left out, so that scores and ranks are those of a search that had not found them.
      vectors: TF-IDF vectors of the queries [Q, F].
      exclude: Labels to leave out for each query, Q rows.
      filters: Labels that each query may have.
    """
    candidates, features = [], []
    found = found if exclude is None else found.without(exclude)
    found = found.first(self.widths.labels, self.widths.queries)
    for start in range(0, len(found.label_ids), QUERIES_PER_BLOCK):
      rows = np.arange(start, min(start + QUERIES_PER_BLOCK, len(found.label_ids)))
      sources = self._sources(found, vectors, rows)
      part = candidates_of(
        sources,
        self.widths,
        exclude=None if exclude is None else exclude.take(rows),
        filters=None if filters is None else filters.take(rows),
      )
      candidates.append(part)
      described = candidate_features(sources, part, self.frequencies)
      if self.classifiers_of is not None:
        scores = candidate_scores(self.classifiers_of, part, embeddings[rows])
        described = np.concatenate([described, classifier_features(scores, part)], axis=1)
      features.append(described)
    if not candidates:
      raise ValueError("there are no queries")
    values = np.concatenate([part.values for part in candidates])
    lengths = np.concatenate([part.lengths for part in candidates])
    return Ragged.of_lengths(values, lengths), np.concatenate(features)

  def _sources(self, found: Neighbors, vectors: scipy.sparse.csr_array, rows: np.ndarray) -> Sources:
    widths, block = self.widths, vectors[rows]
    lexical = Neighbors(
      *self.labels.search(block, widths.lexical_labels), *self.queries.search(block, widths.lexical_queries)
    )
    return sources_of(found.take(rows), lexical, self.labels_of_queries, len(self.frequencies))


@dataclasses.dataclass(frozen=True)
class ScoredCandidates:
  """Candidates of Q queries with their probabilities.

  Attributes:
    candidates: Ids of the labels, Q rows with P labels in total.
    probabilities: float32 [P].
  """

  candidates: Ragged
  probabilities: np.ndarray

  @classmethod
  def score(cls, model: BlendModel, candidates: Ragged, features: np.ndarray) -> "ScoredCandidates":
    """Returns the candidates with the probabilities that a model gives their features [P, V]."""
    return cls(candidates, model.probabilities(features))

  def ranked(
    self,
    k: int,
    inverse_propensity: np.ndarray,
    *,
    tail: float | np.ndarray = 0.0,
    min_probability: float | np.ndarray = 0.0,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first k labels of each query by `dial_scores`.

    Args:
      k: Number of labels.
      inverse_propensity: Inverse propensities [L].
      tail: 0 to 1: how much more rare labels count; see `dial_scores`. One number, or [Q].
      min_probability: Candidates of a lower probability are left out. One number, or [Q].

    Returns:
      Probabilities float32 [Q, K], which descend only if `tail` is 0, and ids int32 [Q, K], the lower id first among
      equal scores. Probability -inf and id -1 fill the places of a query with fewer candidates.
    """
    queries = self.candidates.row_ids()
    tail, least = (np.broadcast_to(value, len(self.candidates))[queries] for value in (tail, min_probability))
    order_by = dial_scores(self.probabilities, inverse_propensity[self.candidates.values], tail)
    order_by[self.probabilities < least] = -np.inf
    width = max(k, int(self.candidates.lengths.max(initial=0)))
    rows = [
      np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=missing)
      for part, missing in (
        (padded(self.candidates, order_by, -np.inf), -np.inf),
        (padded(self.candidates, self.probabilities, -np.inf), -np.inf),
        (padded(self.candidates, self.candidates.values, -1), -1),
      )
    ]
    best = top_k_positions(rows[0], k)
    values, probabilities, ids = (np.take_along_axis(part, best, axis=1) for part in rows)
    kept = np.isfinite(values)
    return np.where(kept, probabilities, -np.inf).astype(np.float32), np.where(kept, ids, -1).astype(np.int32)
