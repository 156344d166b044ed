"""Evaluates embeddings on a split: plain search, retrieval-augmented inference, deciles, intervals."""

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh
import numpy as np

from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.bootstrap import bootstrap_intervals
from vixml_jax.ragged import Ragged
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.index import Index, make_index, search_excluding
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import scann_available


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How to evaluate.

  Attributes:
    ks: k of P, nDCG, PSP and PSnDCG.
    recall_ks: k of recall.
    bootstrap_samples: resamples behind the 95% intervals; 0 for none.
    retrieval_augmented: whether to add the second row.
    retrieval_hits: labels, and training queries, that retrieval-augmented inference looks at.
    retrieval_lambda: weight of labels against training queries.
    retrieval_temperature: of the softmax over both.
  """

  ks: tuple[int, ...]
  recall_ks: tuple[int, ...]
  bootstrap_samples: int
  retrieval_augmented: bool
  retrieval_hits: int
  retrieval_lambda: float
  retrieval_temperature: float

  @property
  def depth(self) -> int:
    """How many labels a query must be given for every metric."""
    return max(*self.ks, *self.recall_ks)


@dataclasses.dataclass(frozen=True)
class Queries:
  """Queries with answers.

  Attributes:
    embeddings: float32 [Q, D], unit norm.
    labels: their positives, Q rows.
    exclude: labels to take out before the cut at k, Q rows.
  """

  embeddings: np.ndarray
  labels: Ragged
  exclude: Ragged


@dataclasses.dataclass(frozen=True)
class Memory:
  """What queries are searched against.

  Attributes:
    prototypes: float32 [L, D].
    queries: float32 [N, D], embeddings of the training queries for retrieval augmentation.
    labels: the labels of those training queries, N rows.
    propensity: inverse propensities [L], for PSP.
  """

  prototypes: np.ndarray
  queries: np.ndarray
  labels: Ragged
  propensity: np.ndarray


class IndexedMemory:
  """A memory with its indexes, each built when it is first searched and then kept for the next set of queries.

  Attributes:
    memory: what is searched.
    search: "exact" or "scann".
  """

  def __init__(self, memory: Memory, search: str, mesh: Mesh):
    self.memory = memory
    self.search = search
    self._mesh = mesh

  @functools.cached_property
  def labels(self) -> Index:
    """Of the prototypes.

    Raises:
      InputError: if the search asked for cannot run here; so does `queries`.
    """
    return make_index(self.search, self.memory.prototypes, self._mesh)

  @functools.cached_property
  def queries(self) -> Index:
    """Of the training queries."""
    return make_index(self.search, self.memory.queries, self._mesh)

  @functools.cached_property
  def scann(self) -> Index | None:
    """ScaNN over the prototypes, to compare exact search with; None where that was not asked for or cannot run."""
    if self.search != "exact" or not scann_available()[0]:
      return None
    return make_index("scann", self.memory.prototypes)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results of one split; all values in percent.

  Attributes:
    plain: metrics of plain search over the prototypes.
    augmented: metrics of retrieval-augmented inference; empty where it was not asked for.
    intervals: 95% bootstrap intervals of each, under "plain" and "augmented".
    deciles: of each, metrics by label frequency.
    scann_recall: share of the exact top hits that ScaNN finds, by k; empty where it is not installed.
    per_query: the metrics of every query, of each.
    ids: int32 [Q, K] of each.
    scores: float32 [Q, K] of each.
  """

  plain: dict[str, float]
  augmented: dict[str, float]
  intervals: dict[str, dict[str, tuple[float, float]]]
  deciles: dict[str, list[dict[str, Any]]]
  scann_recall: dict[str, float]
  per_query: dict[str, metrics.QueryMetrics]
  ids: dict[str, np.ndarray]
  scores: dict[str, np.ndarray]

  def final_metrics(self) -> dict[str, Any]:
    """Flat keys of final_metrics.json: the plain row, and the second row under `RA/`."""
    return _flat(self.plain, self.augmented) | {f"ScaNN/{name}": value for name, value in self.scann_recall.items()}

  def of_queries(self, rows: np.ndarray, bootstrap_samples: int) -> dict[str, Any]:
    """The same for some of the queries, as evaluation.json holds it.

    Args:
      rows: int [R], which queries, at least one.
      bootstrap_samples: resamples behind their intervals; 0 for none.

    Returns:
      `queries`, how many; `metrics`, flat; `intervals_95` of each row.
    """
    some = {name: values.take(rows) for name, values in self.per_query.items()}
    means = {name: values.mean() for name, values in some.items()}
    return {
      "queries": len(rows),
      "metrics": _flat(means["plain"], means.get("augmented", {})),
      "intervals_95": _intervals(some, bootstrap_samples),
    }


def find_neighbors(indexed: IndexedMemory, queries: Queries, config: EvaluationConfig):
  """The two searches of retrieval-augmented inference."""
  return retrieval_augmented.search_both(
    indexed.labels,
    indexed.queries,
    queries.embeddings,
    label_hits=config.retrieval_hits,
    query_hits=config.retrieval_hits,
  )


def choose_setting(indexed: IndexedMemory, queries: Queries, config: EvaluationConfig):
  """The (lambda, temperature) to use, by `retrieval_augmented.pick` on held-out queries, and all that were tried."""
  memory = indexed.memory
  return retrieval_augmented.choose(
    find_neighbors(indexed, queries, config), memory.labels, queries.labels, memory.propensity, exclude=queries.exclude
  )


def evaluate(indexed: IndexedMemory, queries: Queries, config: EvaluationConfig) -> Evaluation:
  """Both rows on one split.

  Args:
    indexed: what to search.
    queries: what to answer.
    config: how.

  Raises:
    InputError: if the search asked for cannot run here.
  """
  memory = indexed.memory
  found = {"plain": search_excluding(indexed.labels, queries.embeddings, config.depth, queries.exclude)}
  if config.retrieval_augmented:
    found["augmented"] = retrieval_augmented.combine(
      find_neighbors(indexed, queries, config),
      memory.labels,
      num_labels=len(memory.prototypes),
      lambda_=config.retrieval_lambda,
      temperature=config.retrieval_temperature,
      k=config.depth,
      exclude=queries.exclude,
    )
  all_ids = {name: ids for name, (_, ids) in found.items()}
  per_query = {
    name: metrics.query_metrics(
      ids, queries.labels, memory.propensity, precision_ks=config.ks, recall_ks=config.recall_ks
    )
    for name, ids in all_ids.items()
  }
  frequencies = np.bincount(memory.labels.values, minlength=len(memory.prototypes))
  return Evaluation(
    plain=per_query["plain"].mean(),
    augmented=per_query["augmented"].mean() if config.retrieval_augmented else {},
    intervals=_intervals(per_query, config.bootstrap_samples),
    deciles={
      name: metrics.metrics_by_frequency(
        ids, queries.labels, frequencies, precision_ks=config.ks, recall_ks=config.recall_ks
      )
      for name, ids in all_ids.items()
    },
    scann_recall=_scann_recall(indexed, queries, config, all_ids["plain"]),
    per_query=per_query,
    ids=all_ids,
    scores={name: scores for name, (scores, _) in found.items()},
  )


def _flat(plain: dict[str, float], augmented: dict[str, float]) -> dict[str, float]:
  return plain | {f"RA/{name}": value for name, value in augmented.items()}


def _intervals(per_query: dict[str, metrics.QueryMetrics], resamples: int) -> dict[str, dict[str, tuple[float, float]]]:
  return {
    name: bootstrap_intervals(values, resamples=resamples) if resamples else {} for name, values in per_query.items()
  }


def _scann_recall(
  indexed: IndexedMemory, queries: Queries, config: EvaluationConfig, ids: np.ndarray
) -> dict[str, float]:
  """How much of the exact ranking ScaNN finds, where exact search was asked for and ScaNN is there."""
  if indexed.scann is None:
    return {}
  _, found = search_excluding(indexed.scann, queries.embeddings, config.depth, queries.exclude)
  return {f"recall@{k}": 100 * overlap(found[:, :k], ids[:, :k]) for k in config.recall_ks}
