"""TF-IDF vectors of texts by words and pairs of words, and search over them.

Words are hashed to columns (scikit-learn's `HashingVectorizer`), so that memory does not grow with the vocabulary, and
the whole model is one array of inverse document frequencies. The weight of an n-gram that occurs c times in a text is
(1 + ln c) * idf, with idf = ln((1 + n) / (1 + df)) + 1 over n texts; vectors have unit length. These are the formulas
of scikit-learn's `TfidfTransformer` with `sublinear_tf=True`.
"""

from collections.abc import Iterable, Sequence
import dataclasses

import numpy as np
import scipy.sparse

from vixml_jax.blend.libraries import import_library
from vixml_jax.ragged import offsets_of

NUM_COLUMNS = 2**21
"""Number of columns that n-grams are hashed to, F."""
MOST_PER_COLUMN = 1024
"""Largest number of items that the list of a column holds: those in which the n-gram weighs most."""
_MOST_CHARACTERS = 2048
_QUERIES_PER_BLOCK = 256


def count_ngrams(texts: Iterable[Sequence[str]], num_columns: int = NUM_COLUMNS) -> scipy.sparse.csr_array:
  """Returns how often each word and each pair of adjacent words occurs in each text, float32 [M, F].

  Args:
    texts: Blocks of texts, M in total. Of a long text, the first 2,048 characters count.
    num_columns: F, a power of two. N-grams that share a column are counted together.

  Raises:
    InputError: scikit-learn is not installed.
  """
  vectorizer = import_library("sklearn.feature_extraction.text").HashingVectorizer(
    n_features=num_columns, ngram_range=(1, 2), alternate_sign=False, norm=None, dtype=np.float32
  )
  parts = [
    scipy.sparse.csr_array(vectorizer.transform([text[:_MOST_CHARACTERS] for text in block]))
    for block in texts
    if block
  ]
  if not parts:
    return scipy.sparse.csr_array((0, num_columns), dtype=np.float32)
  return scipy.sparse.csr_array(scipy.sparse.vstack(parts, format="csr"))


def keep_rows(vectors: scipy.sparse.csr_array, kept: np.ndarray) -> scipy.sparse.csr_array:
  """Returns a matrix of the same shape, in which the rows that are not chosen by bool [M] are empty."""
  if kept.all():
    return vectors
  lengths = np.diff(vectors.indptr)
  values = np.repeat(kept, lengths)
  indptr = offsets_of(np.where(kept, lengths, 0))
  return scipy.sparse.csr_array((vectors.data[values], vectors.indices[values], indptr), shape=vectors.shape)


@dataclasses.dataclass(frozen=True)
class TfIdf:
  """Weights of n-grams.

  Attributes:
    idf: Inverse document frequency of each column, float32 [F].
  """

  idf: np.ndarray

  @classmethod
  def fit(cls, counts: Sequence[scipy.sparse.csr_array]) -> "TfIdf":
    """Returns the weights by the texts of all given matrices of counts, each [M, F]."""
    total = sum(part.shape[0] for part in counts)
    frequencies = sum(np.bincount(part.indices, minlength=part.shape[1]) for part in counts)
    return cls((np.log((1 + total) / (1 + frequencies)) + 1).astype(np.float32))

  def vectors(self, counts: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Returns the vectors of unit length of counted texts, float32 [M, F]; a text without words has a zero vector."""
    weights = (1 + np.log(counts.data)) * self.idf[counts.indices]
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    norms = np.sqrt(np.bincount(rows, weights.astype(np.float64) ** 2, minlength=counts.shape[0]))
    return scipy.sparse.csr_array(
      ((weights / norms[rows]).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
    )


@dataclasses.dataclass(frozen=True)
class LexicalIndex:
  """Items that share n-grams with a query are found by a product of sparse matrices.

  Attributes:
    postings: Weights of the items of each column, float32 [F, M].
  """

  postings: scipy.sparse.csr_array

  @classmethod
  def build(cls, vectors: scipy.sparse.csr_array, most_per_column: int = MOST_PER_COLUMN) -> "LexicalIndex":
    """Returns the index of vectors [M, F].

    Of an n-gram that very many items have, only the items of greatest weight are kept, so that the time of a query does
    not grow with their number (static pruning of an inverted index, Carmel et al., SIGIR 2001).
    """
    postings = scipy.sparse.csr_array(vectors.T.tocsr())
    lengths = np.diff(postings.indptr)
    if lengths.max(initial=0) <= most_per_column:
      return cls(postings)
    kept = np.ones(len(postings.data), bool)
    for column in np.flatnonzero(lengths > most_per_column):
      span = slice(postings.indptr[column], postings.indptr[column + 1])
      kept[span] = _are_greatest(postings.data[span], most_per_column)
    indptr = offsets_of(np.minimum(lengths, most_per_column))
    return cls(scipy.sparse.csr_array((postings.data[kept], postings.indices[kept], indptr), shape=postings.shape))

  def search(self, queries: scipy.sparse.csr_array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k items of highest inner product of each query, by blocks of 256 queries.

    Args:
      queries: Vectors [Q, F].
      k: Number of items.

    Returns:
      Scores float32 [Q, K] in descending order and ids int32 [Q, K], the lower id first among equal scores. Score -inf
      and id -1 fill the places of a query that shares n-grams with fewer items.
    """
    num_queries = queries.shape[0]
    scores = np.full((num_queries, k), -np.inf, np.float32)
    ids = np.full((num_queries, k), -1, np.int32)
    for start in range(0, num_queries, _QUERIES_PER_BLOCK):
      block = queries[start : start + _QUERIES_PER_BLOCK] @ self.postings
      for row in range(block.shape[0]):
        span = slice(block.indptr[row], block.indptr[row + 1])
        found = _best(block.data[span], block.indices[span], k)
        scores[start + row, : len(found[0])], ids[start + row, : len(found[1])] = found
    return scores, ids


def _are_greatest(values: np.ndarray, count: int) -> np.ndarray:
  """Returns which of the values are the `count` greatest, the first ones among equals, bool."""
  threshold = np.partition(values, len(values) - count)[len(values) - count]
  greatest = values > threshold
  equal = np.flatnonzero(values == threshold)
  greatest[equal[: count - np.count_nonzero(greatest)]] = True
  return greatest


def _best(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the k greatest scores and their ids, the lower id first among equal scores."""
  if len(scores) > k:
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
    kept = scores >= threshold
    scores, ids = scores[kept], ids[kept]
  order = np.lexsort((ids, -scores))[:k]
  return scores[order], ids[order]
