"""Evaluates embedded queries against labels: plain search, retrieval augmentation, deciles, intervals."""

import dataclasses
import functools
from typing import Any

from jax.sharding import Mesh
import numpy as np

from vixml_jax.evaluation import metrics, tuning
from vixml_jax.evaluation.bootstrap import bootstrap_intervals
from vixml_jax.ragged import Ragged
from vixml_jax.search.index import Index, make_index, search_excluding
from vixml_jax.search.membership import overlap
from vixml_jax.search.retrieval_augmented import Neighbors, RetrievalSettings, combine, search_both
from vixml_jax.search.scann_index import scann_available


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How to evaluate.

  Attributes:
    ks: k of P, nDCG, PSP and PSnDCG.
    recall_ks: k of recall.
    bootstrap_samples: resamples behind the 95% intervals; 0 for no intervals.
    retrieval: settings of the retrieval-augmented row; None for no such row.
  """

  ks: tuple[int, ...]
  recall_ks: tuple[int, ...]
  bootstrap_samples: int
  retrieval: RetrievalSettings | None

  @property
  def depth(self) -> int:
    """Number of labels a query that all metrics need."""
    return max(*self.ks, *self.recall_ks)


@dataclasses.dataclass(frozen=True)
class EvaluationQueries:
  """Queries with known labels.

  Attributes:
    embeddings: float32 [Q, D], unit norm.
    labels: positives of each query, Q rows.
    filter: labels of each query that are removed before the cut at k, Q rows.
  """

  embeddings: np.ndarray
  labels: Ragged
  filter: Ragged


@dataclasses.dataclass(frozen=True)
class EvaluationIndex:
  """Labels and training queries to search; each index is built at its first search and then kept.

  Attributes:
    prototypes: float32 [L, D], label prototypes.
    train_embeddings: float32 [N, D], embeddings of training queries, for retrieval augmentation.
    train_labels: labels of these training queries, N rows.
    inverse_propensity: float64 [L], for PSP.
    search: "exact" or "scann".
    mesh: devices of exact search.
  """

  prototypes: np.ndarray
  train_embeddings: np.ndarray
  train_labels: Ragged
  inverse_propensity: np.ndarray
  search: str
  mesh: Mesh

  @functools.cached_property
  def label_index(self) -> Index:
    """Index of the prototypes.

    Raises:
      InputError: the search cannot run here; so does `query_index`.
    """
    return make_index(self.search, self.prototypes, self.mesh)

  @functools.cached_property
  def query_index(self) -> Index:
    """Index of the training queries."""
    return make_index(self.search, self.train_embeddings, self.mesh)

  @functools.cached_property
  def scann_index(self) -> Index | None:
    """ScaNN over the prototypes, to compare with exact search; None if ScaNN searches already or cannot run here."""
    if self.search != "exact" or not scann_available()[0]:
      return None
    return make_index("scann", self.prototypes)

  def neighbors(self, queries: EvaluationQueries, hits: int) -> Neighbors:
    """Returns the results of the two searches of retrieval-augmented inference."""
    return search_both(self.label_index, self.query_index, queries.embeddings, label_hits=hits, query_hits=hits)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results on one split; all values in percent.

  Attributes:
    plain: metrics of plain search over the prototypes.
    augmented: metrics of retrieval-augmented inference; empty where it was not asked for.
    intervals: 95% bootstrap intervals of each row, under "plain" and "augmented".
    deciles: metrics by label frequency, of each row.
    scann_recall: share of the exact top hits that ScaNN finds, by k; empty where ScaNN is not installed.
    per_query: metrics of every query, of each row.
    ids: int32 [Q, K], labels found, of each row.
    scores: float32 [Q, K], of each row.
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
    """Returns the flat keys of final_metrics.json: the plain row, and the second row under `RA/`."""
    scann = {f"ScaNN/{name}": value for name, value in self.scann_recall.items()}
    return _flat_metrics(self.plain, self.augmented) | scann

  def of_queries(self, rows: np.ndarray, bootstrap_samples: int) -> dict[str, Any]:
    """Returns the results on some of the queries, as evaluation.json contains them.

    Args:
      rows: int [R], which queries, at least one.
      bootstrap_samples: resamples behind the intervals; 0 for no intervals.

    Returns:
      `queries`, their number; `metrics`, flat; `intervals_95` of each row.
    """
    some = {name: values.take(rows) for name, values in self.per_query.items()}
    means = {name: values.mean() for name, values in some.items()}
    return {
      "queries": len(rows),
      "metrics": _flat_metrics(means["plain"], means.get("augmented", {})),
      "intervals_95": _intervals(some, bootstrap_samples),
    }


def choose_retrieval(
  index: EvaluationIndex, held_out: EvaluationQueries, hits: int
) -> tuple[RetrievalSettings, list[tuning.Setting]]:
  """Returns the lambda and temperature that `tuning.choose` picks on held-out queries, and all that were tried.

  Args:
    index: labels and training queries; held-out queries are among neither the queries nor the centroids.
    held_out: the held-out queries.
    hits: labels, and training queries, that each query retrieves.
  """
  best, settings = tuning.choose(
    index.neighbors(held_out, hits),
    index.train_labels,
    held_out.labels,
    index.inverse_propensity,
    exclude=held_out.filter,
  )
  return RetrievalSettings(best.lambda_, best.temperature, hits), settings


def evaluate(index: EvaluationIndex, queries: EvaluationQueries, config: EvaluationConfig) -> Evaluation:
  """Evaluates plain search, and retrieval-augmented inference where the config asks for it.

  Raises:
    InputError: the search cannot run here.
  """
  found = {"plain": search_excluding(index.label_index, queries.embeddings, config.depth, queries.filter)}
  if config.retrieval is not None:
    found["augmented"] = combine(
      index.neighbors(queries, config.retrieval.hits),
      index.train_labels,
      num_labels=len(index.prototypes),
      lambda_=config.retrieval.lambda_,
      temperature=config.retrieval.temperature,
      k=config.depth,
      exclude=queries.filter,
    )
  all_ids = {name: ids for name, (_, ids) in found.items()}
  per_query = {
    name: metrics.query_metrics(
      ids, queries.labels, index.inverse_propensity, precision_ks=config.ks, recall_ks=config.recall_ks
    )
    for name, ids in all_ids.items()
  }
  frequencies = np.bincount(index.train_labels.values, minlength=len(index.prototypes))
  return Evaluation(
    plain=per_query["plain"].mean(),
    augmented=per_query["augmented"].mean() if "augmented" in per_query else {},
    intervals=_intervals(per_query, config.bootstrap_samples),
    deciles={
      name: metrics.metrics_by_frequency(
        ids, queries.labels, frequencies, precision_ks=config.ks, recall_ks=config.recall_ks
      )
      for name, ids in all_ids.items()
    },
    scann_recall=_scann_recall(index, queries, config, all_ids["plain"]),
    per_query=per_query,
    ids=all_ids,
    scores={name: scores for name, (scores, _) in found.items()},
  )


def _flat_metrics(plain: dict[str, float], augmented: dict[str, float]) -> dict[str, float]:
  return plain | {f"RA/{name}": value for name, value in augmented.items()}


def _intervals(per_query: dict[str, metrics.QueryMetrics], resamples: int) -> dict[str, dict[str, tuple[float, float]]]:
  return {
    name: bootstrap_intervals(values, resamples=resamples) if resamples else {} for name, values in per_query.items()
  }


def _scann_recall(
  index: EvaluationIndex, queries: EvaluationQueries, config: EvaluationConfig, ids: np.ndarray
) -> dict[str, float]:
  """Returns the share of the exact ranking that ScaNN finds, where exact search ran and ScaNN is installed."""
  if index.scann_index is None:
    return {}
  _, found = search_excluding(index.scann_index, queries.embeddings, config.depth, queries.filter)
  return {f"recall@{k}": 100 * overlap(found[:, :k], ids[:, :k]) for k in config.recall_ks}
