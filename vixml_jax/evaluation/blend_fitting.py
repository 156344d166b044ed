"""Fits the blend on held-out training queries, which nothing that it sees includes."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import logging

import numpy as np
import scipy.sparse

from vixml_jax.blend.candidates import positives_of
from vixml_jax.blend.features import CLASSIFIER_FEATURES
from vixml_jax.blend.lexical import TfIdf, count_ngrams, keep_rows
from vixml_jax.blend.model import BlendModel
from vixml_jax.blend.ranking import BlendIndex
from vixml_jax.blend.settings import BlendSettings
from vixml_jax.evaluation.blend_row import BlendRanker
from vixml_jax.evaluation.evaluator import QUERIES_PER_BLOCK, EvaluationIndex, EvaluationQueries
from vixml_jax.input.corpus import Corpus
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import at_equal_distances
from vixml_jax.row_files import RowFiles
from vixml_jax.search.index import search_width
from vixml_jax.search.label_index_blend import StoredBlend, WordVectors
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage

MOST_FITTED = 8192
"""Number of held-out queries that the blend is fitted on, at most."""
_TEXTS_PER_BLOCK = 4096
_SHARE_WITHOUT_CLASSIFIER = 0.05

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CorpusWords:
  """TF-IDF vectors of a data set, whose weights know no held-out query.

  Attributes:
    tfidf: Weights of n-grams, fitted on labels and known training queries.
    labels: Vectors of the labels [L, F].
    train: Vectors of all training queries [N, F].
  """

  tfidf: TfIdf
  labels: scipy.sparse.csr_array
  train: scipy.sparse.csr_array

  @classmethod
  def read(cls, corpus: Corpus, known: np.ndarray) -> "CorpusWords":
    """Reads and counts the texts of labels and training queries.

    Args:
      corpus: The data set.
      known: bool [N], the training queries whose words the weights may know.
    """
    with stage("count the words of labels and training queries"):
      labels = count_ngrams(_blocks(corpus.label_text, corpus.num_labels))
      train = _count_queries(corpus, "train", len(corpus.train_tokens))
    tfidf = TfIdf.fit([labels, train[np.flatnonzero(known)]])
    return cls(tfidf, tfidf.vectors(labels), tfidf.vectors(train))

  def test(self, corpus: Corpus) -> scipy.sparse.csr_array:
    """Returns the vectors of the test queries [M, F]."""
    return self.tfidf.vectors(
      count_ngrams(_blocks(functools.partial(corpus.query_text, "test"), len(corpus.test_tokens)))
    )

  def index(self, train_labels: Ragged, classifiers: ShardedRows | None, known: np.ndarray | None = None) -> BlendIndex:
    """Returns the blend's index of the labels and the training queries.

    Args:
      train_labels: Labels of the training queries, N rows.
      classifiers: Classifiers of the labels [L, D + 1], if they have any.
      known: bool [N], the training queries that may be found; None for all.
    """
    find = None if classifiers is None else functools.partial(_rows_of, classifiers)
    if known is None or known.all():
      return BlendIndex.build(self.labels, self.train, train_labels, classifiers_of=find)
    return BlendIndex.build(self.labels, keep_rows(self.train, known), train_labels.keep(known), classifiers_of=find)


@dataclasses.dataclass(frozen=True)
class FittedBlend:
  """A trained blend, with the words of the data set that it ranks.

  Attributes:
    model: The trained model.
    words: Words of all labels and training queries.
    classifiers: Classifiers of the labels [L, D + 1]; None if labels have none.
  """

  model: BlendModel
  words: CorpusWords
  classifiers: ShardedRows | None

  def ranker(self, train_labels: Ragged) -> BlendRanker:
    """Returns the blend with the labels of all training queries, N rows."""
    return BlendRanker(self.model, self.words.index(train_labels, self.classifiers))

  def stored(self, propensity_a: float, propensity_b: float, classifiers: RowFiles | None) -> StoredBlend:
    """Returns the blend as an index stores it.

    Args:
      propensity_a: A of the propensities of labels.
      propensity_b: B of them.
      classifiers: Files of the classifiers, if labels have any.
    """
    settings = BlendSettings(propensity_a, propensity_b)
    vectors = WordVectors(self.words.labels, self.words.train)
    return StoredBlend(self.model.text, self.words.tfidf.idf, vectors, settings.as_json(), classifiers)


def hidden_labels(num_labels: int) -> np.ndarray:
  """Returns the labels whose classifiers are hidden while the blend is fitted, bool [L]: one in twenty, at random.

  So the blend also learns to rank labels without a classifier, which are those that are added later.
  """
  return np.random.default_rng(0).random(num_labels) < _SHARE_WITHOUT_CLASSIFIER


def fit_blend(index: EvaluationIndex, blend: BlendIndex, held_out: EvaluationQueries) -> BlendModel:
  """Returns a model that is trained on at most 8,192 held-out queries, at equal distances.

  Where labels have classifiers, those of `hidden_labels` are hidden from the model. The vectors of these labels in the
  index must be those of labels without a classifier.

  Args:
    index: Labels and training queries; held-out queries are among neither the queries nor the centroids.
    blend: Words and frequencies of the same labels and training queries.
    held_out: The held-out queries, with their words.

  Raises:
    InputError: There are too few held-out queries.
  """
  chosen = at_equal_distances(len(held_out), MOST_FITTED)
  features, hits = [], []
  hidden = hidden_labels(len(blend.frequencies))
  with stage(f"fit the blend on {len(chosen):,} held-out queries"):
    for rows, block in held_out.blocks(QUERIES_PER_BLOCK):
      wanted = chosen[(chosen >= rows[0]) & (chosen <= rows[-1])] - rows[0]
      if not len(wanted):
        continue
      assert block.words is not None
      embeddings = np.asarray(block.embeddings)[wanted]
      exclude = block.filter.take(wanted)
      found = index.search_both(
        embeddings, search_width(blend.widths.labels, exclude, len(blend.frequencies)), blend.widths.queries
      )
      candidates, part = blend.described(embeddings, found, block.words[wanted], exclude=exclude)
      if blend.classifiers_of is not None:
        part[hidden[candidates.values], -len(CLASSIFIER_FEATURES) :] = np.nan
      features.append(part)
      hits.append(positives_of(candidates, block.labels.take(wanted)))
    joined, all_hits = np.concatenate(features), np.concatenate(hits)
    model = BlendModel.fit(joined, all_hits)
  _log.info("blend: %d candidates of %d held-out queries, %d positives", len(joined), len(chosen), int(all_hits.sum()))
  return model


def _rows_of(classifiers: ShardedRows, ids: np.ndarray) -> np.ndarray:
  return np.asarray(classifiers.take(ids))


def _count_queries(corpus: Corpus, split: str, count: int) -> scipy.sparse.csr_array:
  return count_ngrams(_blocks(functools.partial(corpus.query_text, split), count))


def _blocks(texts_of: Callable[[range], list[str]], count: int) -> Iterator[list[str]]:
  """Yields the texts of rows 0 to `count` - 1 in blocks."""
  for start in range(0, count, _TEXTS_PER_BLOCK):
    yield texts_of(range(start, min(start + _TEXTS_PER_BLOCK, count)))
