"""Results of methods without training by this package, on the same split: what training has to exceed.

- "tfidf": labels and training queries that share words with a query. TF-IDF vectors by words and pairs of words take
  the place of embeddings in retrieval-augmented inference.
- "untrained": the encoder before its first step, on texts only, in plain search and in retrieval-augmented inference.
- "plt": probabilistic label trees of napkinXC over the same TF-IDF vectors (Jasinska-Kobus et al., arXiv 2009.11218).

Lambda and temperature of retrieval augmentation are chosen on held-out queries, as for the trained model.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import logging

import numpy as np
import scipy.sparse

from vixml_jax.blend.lexical import LexicalIndex, keep_rows
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.evaluation import tuning
from vixml_jax.evaluation.blend_fitting import CorpusWords
from vixml_jax.evaluation.evaluator import MOST_HELD_OUT, QUERIES_PER_BLOCK, EvaluationConfig
from vixml_jax.evaluation.label_trees import TreesFailedError, napkinxc_models, rank_by_label_trees
from vixml_jax.evaluation.metrics import QueryMetrics, query_metrics
from vixml_jax.rounding import at_equal_distances
from vixml_jax.run.data import RunData
from vixml_jax.search.index import Index, make_index, search_width
from vixml_jax.search.membership import drop_members
from vixml_jax.search.retrieval_augmented import Neighbors, RetrievalSettings, combine
from vixml_jax.stages import stage
from vixml_jax.typing import Tree

_log = logging.getLogger(__name__)
_Search = Callable[[np.ndarray], Neighbors]


def check_baselines(names: Sequence[str]) -> None:
  """Checks that the libraries of baselines are installed.

  Raises:
    InputError: napkinXC cannot be imported; the message has the command that installs it.
  """
  if "plt" in names:
    napkinxc_models()


@dataclasses.dataclass(frozen=True)
class BaselineTask:
  """The data set and the evaluation that baselines share.

  Attributes:
    data: the data set, with held-out queries.
    inverse_propensity: float64 [L].
    config: which metrics to compute.
    retrieval: how many labels and training queries retrieval augmentation looks up.
  """

  data: RunData
  inverse_propensity: np.ndarray
  config: EvaluationConfig
  retrieval: RetrievalSettings

  def augmented(self, held_out: _Search, test: _Search) -> dict[str, float]:
    """Returns the metrics of retrieval-augmented inference, whose settings are chosen on held-out queries.

    Args:
      held_out: Searches training queries by their numbers, among labels and the other training queries.
      test: Searches test queries by their numbers, among labels and all training queries.
    """
    corpus = self.data.corpus
    rows = self.data.validation_rows
    rows = rows[at_equal_distances(len(rows), MOST_HELD_OUT)]
    best, _ = tuning.choose(
      self.retrieval.kept(Neighbors.concatenate([held_out(block) for block in _blocks(rows)])),
      corpus.train_labels.keep(self.data.known),
      corpus.train_labels.take(rows),
      self.inverse_propensity,
      exclude=corpus.train_filter.take(rows),
    )

    def rank(block: np.ndarray) -> np.ndarray:
      return combine(
        self.retrieval.kept(test(block)),
        corpus.train_labels,
        num_labels=self.data.num_labels,
        lambda_=best.lambda_,
        temperature=best.temperature,
        k=self.config.depth,
        exclude=corpus.test_filter.take(block),
      )[1]

    return self.metrics(rank)

  def metrics(self, rank: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Returns the metrics of a ranking of the test queries.

    Args:
      rank: Returns ids [rows, depth] of test queries, without the labels that their filter excludes.
    """
    corpus, ks, recall_ks = self.data.corpus, self.config.ks, self.config.recall_ks
    parts = [
      query_metrics(
        rank(block), corpus.test_labels.take(block), self.inverse_propensity, precision_ks=ks, recall_ks=recall_ks
      )
      for block in _blocks(np.arange(len(corpus.test_labels)))
    ]
    return QueryMetrics.concatenate(parts).mean()


def tfidf(task: BaselineTask, words: CorpusWords) -> dict[str, dict[str, float]]:
  """Returns the row of retrieval augmentation over TF-IDF vectors."""
  hits, labels = task.retrieval, LexicalIndex.build(words.labels)
  known = LexicalIndex.build(keep_rows(words.train, task.data.known))
  everything, test = LexicalIndex.build(words.train), words.test(task.data.corpus)

  def search(queries: LexicalIndex, vectors: scipy.sparse.csr_array) -> Neighbors:
    return Neighbors(*labels.search(vectors, hits.hits), *queries.search(vectors, hits.num_query_hits))

  with stage("evaluate TF-IDF"):
    found = task.augmented(lambda rows: search(known, words.train[rows]), lambda rows: search(everything, test[rows]))
  return {"TF-IDF labels + neighbors": found}


def untrained(task: BaselineTask, encoder: ItemEncoder, params: Tree, search: str) -> dict[str, dict[str, float]]:
  """Returns the rows of the encoder before training: plain search and retrieval augmentation.

  Args:
    task: the data set.
    encoder: encodes items.
    params: trainable parameters before the first step.
    search: "exact" or "scann".
  """
  items = {split: items.first_images(0) for split, items in task.data.items.items()}
  labels, train, test = (
    encoder.embed_rows(params, items[split], f"{name} before training")
    for split, name in (("labels", "labels"), ("train", "training queries"), ("test", "test queries"))
  )
  hits, known = task.retrieval, task.data.known
  by_label = make_index(search, labels, encoder.mesh)
  by_query = make_index(search, train, encoder.mesh)
  by_known = make_index(search, train, encoder.mesh, allowed=None if known.all() else known)

  def plain(rows: np.ndarray) -> np.ndarray:
    exclude, depth = task.data.corpus.test_filter.take(rows), task.config.depth
    found = by_label.search(np.asarray(test.take(rows)), search_width(depth, exclude, by_label.num_labels))
    return drop_members(*found, exclude, depth)[1]

  def neighbors(queries: np.ndarray, by_query: Index) -> Neighbors:
    return Neighbors(*by_label.search(queries, hits.hits), *by_query.search(queries, hits.num_query_hits))

  with stage("evaluate the encoder before training"):
    augmented = task.augmented(
      lambda rows: neighbors(np.asarray(train.take(rows)), by_known),
      lambda rows: neighbors(np.asarray(test.take(rows)), by_query),
    )
    return {"encoder before training": task.metrics(plain), "encoder before training + retrieval": augmented}


def plt(task: BaselineTask, words: CorpusWords) -> dict[str, dict[str, float]]:
  """Returns the row of napkinXC's probabilistic label trees, with its default settings.

  If the process that trains them dies, a warning is logged and there is no row.
  """
  corpus = task.data.corpus
  labeled = np.flatnonzero(corpus.train_labels.lengths)
  width = max(search_width(task.config.depth, corpus.test_filter, task.data.num_labels), task.config.depth)
  with stage("train and evaluate napkinXC's label trees"):
    try:
      ids = rank_by_label_trees(words.train[labeled], corpus.train_labels.take(labeled), words.test(corpus), width)
    except TreesFailedError as error:
      _log.warning("no row for napkinXC's label trees (eval.baselines=plt): they run in their own process; %s", error)
      return {}

  def rank(rows: np.ndarray) -> np.ndarray:
    part = ids[rows]
    scores = np.where(part >= 0, -np.arange(part.shape[1], dtype=np.float32), -np.inf)
    return drop_members(scores, part, corpus.test_filter.take(rows), task.config.depth)[1]

  return {"napkinXC PLT": task.metrics(rank)}


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
  for start in range(0, len(rows), QUERIES_PER_BLOCK):
    yield rows[start : start + QUERIES_PER_BLOCK]
