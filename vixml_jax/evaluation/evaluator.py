"""Evaluates embedded queries against labels: plain search, retrieval augmentation, deciles, intervals.

Queries are searched and scored block by block. Of each query, only its metrics are kept; rankings are kept for the few
queries that a report shows.
"""

from collections.abc import Iterator
import dataclasses
import functools
import logging
import math
from typing import Any

from jax.sharding import Mesh
import numpy as np
import tqdm

from vixml_jax.evaluation import metrics, tuning
from vixml_jax.evaluation.bootstrap import bootstrap_intervals
from vixml_jax.ragged import Ragged
from vixml_jax.search.index import Index, make_index, search_excluding, search_width
from vixml_jax.search.membership import drop_members, overlap_counts
from vixml_jax.search.retrieval_augmented import Neighbors, RetrievalSettings, combine
from vixml_jax.search.scann_index import scann_available
from vixml_jax.search.scann_recall import RecallGoal
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage

NUM_EXAMPLES = 30
QUERIES_PER_BLOCK = 4096
"""Number of queries that are searched and scored at a time."""
MOST_HELD_OUT = 32_768
"""Number of held-out queries that retrieval settings are chosen on, at most."""
_SCANN_BYTES = 2 * 2**30

_log = logging.getLogger(__name__)


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
    embeddings: float32 [Q, D], unit norm; on the devices, or on the host.
    labels: positives of each query, Q rows.
    filter: labels of each query that are removed before the cut at k, Q rows.
  """

  embeddings: ShardedRows | np.ndarray
  labels: Ragged
  filter: Ragged

  def __len__(self) -> int:
    return len(self.labels)

  def blocks(self, size: int) -> Iterator[tuple[np.ndarray, "EvaluationQueries"]]:
    """Yields the numbers of the queries of each block, and the block on the host."""
    for start in range(0, len(self), size):
      rows = np.arange(start, min(start + size, len(self)))
      if isinstance(self.embeddings, ShardedRows):
        embeddings = np.asarray(self.embeddings.block(start, min(size, len(self))))[: len(rows)]
      else:
        embeddings = self.embeddings[rows]
      yield rows, EvaluationQueries(embeddings, self.labels.take(rows), self.filter.take(rows))


@dataclasses.dataclass(frozen=True)
class EvaluationIndex:
  """Labels and training queries to search; each index is built at its first search and then kept.

  Attributes:
    prototypes: float32 [L, D], label prototypes; on the devices, or on the host.
    train_embeddings: float32 [N, D], embeddings of training queries, for retrieval augmentation; as above.
    train_labels: labels of these training queries, N rows.
    inverse_propensity: float64 [L], for PSP.
    search: "exact" or "scann".
    mesh: devices of exact search.
    known: bool [N], the training queries that may be found; None for all.
    goal: recall that ScaNN must reach; None takes its settings of search by rules of thumb.
  """

  prototypes: ShardedRows | np.ndarray
  train_embeddings: ShardedRows | np.ndarray
  train_labels: Ragged
  inverse_propensity: np.ndarray
  search: str
  mesh: Mesh
  known: np.ndarray | None = None
  goal: RecallGoal | None = None

  @functools.cached_property
  def label_index(self) -> Index:
    """Index of the prototypes.

    Raises:
      InputError: the search cannot run here; so does `query_index`.
    """
    return make_index(self.search, self.prototypes, self.mesh, goal=self.goal)

  @functools.cached_property
  def query_index(self) -> Index:
    """Index of the training queries."""
    return make_index(self.search, self.train_embeddings, self.mesh, allowed=self.known, goal=self.goal)

  @functools.cached_property
  def scann_index(self) -> Index | None:
    """ScaNN over the prototypes, to compare with exact search.

    None if ScaNN searches already, cannot run here, or needs more than 2 GiB for the prototypes alone.
    """
    if self.search != "exact" or not scann_available()[0]:
      return None
    size = math.prod(self.prototypes.shape) * 4
    if size > _SCANN_BYTES:
      _log.info(
        "ScaNN is not compared with exact search, since it needs more than %.1f GiB on the host; to search with it, "
        "run python -m vixml_jax.evaluate --search=scann",
        size / 2**30,
      )
      return None
    return make_index("scann", self.prototypes, self.mesh, goal=self.goal)

  def neighbors(self, embeddings: np.ndarray, settings: RetrievalSettings) -> Neighbors:
    """Returns the results of the two searches of retrieval-augmented inference, of queries [Q, D]."""
    labels = self.label_index.search(embeddings, settings.hits)
    return self._with_queries(labels, embeddings, settings)

  def _with_queries(
    self, labels: tuple[np.ndarray, np.ndarray], embeddings: np.ndarray, settings: RetrievalSettings
  ) -> Neighbors:
    found = Neighbors(*labels, *self.query_index.search(embeddings, settings.num_query_hits))
    return found.nearest(settings.hits) if settings.joint else found

  def rankings(self, queries: EvaluationQueries, config: EvaluationConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns scores and ids [Q, depth] of a block of queries on the host: "plain", and "augmented" if asked for."""
    embeddings = np.asarray(queries.embeddings)
    retrieval, width = config.retrieval, search_width(config.depth, queries.filter, self.label_index.num_labels)
    # Both rows need the best labels, so one search serves both.
    scores, ids = self.label_index.search(embeddings, width if retrieval is None else max(width, retrieval.hits))
    found = {"plain": drop_members(scores[:, :width], ids[:, :width], queries.filter, config.depth)}
    if retrieval is not None:
      labels = (scores[:, : retrieval.hits], ids[:, : retrieval.hits])
      found["augmented"] = combine(
        self._with_queries(labels, embeddings, retrieval),
        self.train_labels,
        num_labels=len(self.inverse_propensity),
        lambda_=retrieval.lambda_,
        temperature=retrieval.temperature,
        k=config.depth,
        exclude=queries.filter,
      )
    return found


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results on one split; all values in percent.

  Attributes:
    plain: metrics of plain search over the prototypes.
    augmented: metrics of retrieval-augmented inference; empty where it was not asked for.
    intervals: 95% bootstrap intervals of each row, under "plain" and "augmented".
    deciles: metrics by label frequency, of each row.
    scann_recall: share of the exact top hits that ScaNN finds, by k; empty where the two were not compared.
    per_query: metrics of every query, of each row.
    examples: int64 [E], numbers of the queries whose rankings are kept.
    ids: int32 [E, K], labels found, of each row.
    scores: float32 [E, K], of each row.
  """

  plain: dict[str, float]
  augmented: dict[str, float]
  intervals: dict[str, dict[str, tuple[float, float]]]
  deciles: dict[str, list[dict[str, Any]]]
  scann_recall: dict[str, float]
  per_query: dict[str, metrics.QueryMetrics]
  examples: np.ndarray
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
  index: EvaluationIndex, held_out: EvaluationQueries, settings: RetrievalSettings
) -> tuple[RetrievalSettings, list[tuning.Setting]]:
  """Returns the lambda and temperature that `tuning.choose` picks on held-out queries, and all that were tried.

  Of very many held-out queries, 32,768 are used, at equal distances: more would not change the choice.

  Args:
    index: labels and training queries; held-out queries are among neither the queries nor the centroids.
    held_out: the held-out queries.
    settings: how neighbors are searched; its lambda and temperature are ignored.
  """
  chosen = np.unique(np.linspace(0, len(held_out) - 1, min(MOST_HELD_OUT, len(held_out))).astype(np.int64))
  parts = []
  for rows, block in held_out.blocks(QUERIES_PER_BLOCK):
    wanted = chosen[(chosen >= rows[0]) & (chosen <= rows[-1])] - rows[0]
    if len(wanted):
      parts.append(index.neighbors(np.asarray(block.embeddings)[wanted], settings))
  names = [field.name for field in dataclasses.fields(Neighbors)]
  neighbors = Neighbors(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
  best, tried = tuning.choose(
    neighbors,
    index.train_labels,
    held_out.labels.take(chosen),
    index.inverse_propensity,
    exclude=held_out.filter.take(chosen),
  )
  return dataclasses.replace(settings, lambda_=best.lambda_, temperature=best.temperature), tried


def example_queries(labels: Ragged, number: int = NUM_EXAMPLES) -> np.ndarray:
  """Returns random queries that have labels, ascending; the same queries for every model on the same data.

  Args:
    labels: positives of the queries, Q rows.
    number: maximum number of queries.
  """
  labeled = np.flatnonzero(labels.lengths)
  return np.sort(np.random.default_rng(0).choice(labeled, min(number, len(labeled)), replace=False))


def evaluate(
  index: EvaluationIndex, queries: EvaluationQueries, config: EvaluationConfig, examples: np.ndarray | None = None
) -> Evaluation:
  """Evaluates plain search, and retrieval-augmented inference where the config asks for it.

  Args:
    index: the labels and training queries to search.
    queries: the queries; all processes must call this together.
    config: how to evaluate.
    examples: numbers of the queries whose rankings are kept, ascending; None for those of `example_queries`.

  Raises:
    InputError: the search cannot run here.
  """
  examples = example_queries(queries.labels) if examples is None else examples
  frequencies = np.bincount(index.train_labels.values, minlength=len(index.inverse_propensity))
  rows = {
    name: _Row(index, config, frequencies) for name in ("plain", "augmented")[: 1 if config.retrieval is None else 2]
  }
  overlaps = {k: np.zeros(2, np.int64) for k in (config.recall_ks if index.scann_index is not None else ())}
  with (
    stage(f"evaluate {len(queries):,} queries"),
    tqdm.tqdm(total=len(queries), desc="evaluate", unit="query", disable=None, leave=False) as progress,
  ):
    for numbers, block in queries.blocks(QUERIES_PER_BLOCK):
      found = index.rankings(block, config)
      kept = examples[(examples >= numbers[0]) & (examples <= numbers[-1])] - numbers[0]
      for name, (scores, ids) in found.items():
        rows[name].add(scores, ids, block.labels, kept)
      if index.scann_index is not None:
        _, approximate = search_excluding(index.scann_index, np.asarray(block.embeddings), config.depth, block.filter)
        for k in overlaps:
          overlaps[k] += overlap_counts(approximate[:, :k], found["plain"][1][:, :k])
      progress.update(len(block))
    per_query = {name: metrics.QueryMetrics.concatenate(row.per_query) for name, row in rows.items()}
    intervals = _intervals(per_query, config.bootstrap_samples)
  return Evaluation(
    plain=per_query["plain"].mean(),
    augmented=per_query["augmented"].mean() if "augmented" in per_query else {},
    intervals=intervals,
    deciles={name: row.frequencies.rows() for name, row in rows.items()},
    scann_recall={f"recall@{k}": 100 * int(hits) / max(int(total), 1) for k, (hits, total) in overlaps.items()},
    per_query=per_query,
    examples=examples,
    ids={name: np.concatenate(row.ids) for name, row in rows.items()},
    scores={name: np.concatenate(row.scores) for name, row in rows.items()},
  )


class _Row:
  """What is kept of the rankings of one row of the results.

  Attributes:
    per_query: metrics of each block.
    frequencies: hits and positives by label frequency.
    ids: labels found for the examples of each block.
    scores: scores of these.
  """

  def __init__(self, index: EvaluationIndex, config: EvaluationConfig, frequencies: np.ndarray):
    self._propensity, self._config = index.inverse_propensity, config
    self.per_query: list[metrics.QueryMetrics] = []
    self.frequencies = metrics.FrequencyCounts(frequencies, config.ks, config.recall_ks)
    self.ids: list[np.ndarray] = []
    self.scores: list[np.ndarray] = []

  def add(self, scores: np.ndarray, ids: np.ndarray, labels: Ragged, kept: np.ndarray) -> None:
    """Adds a block of queries; the rankings of the queries `kept` stay."""
    ks, recall_ks = self._config.ks, self._config.recall_ks
    self.per_query.append(metrics.query_metrics(ids, labels, self._propensity, precision_ks=ks, recall_ks=recall_ks))
    self.frequencies.add(ids, labels)
    self.ids.append(ids[kept])
    self.scores.append(scores[kept])


def _flat_metrics(plain: dict[str, float], augmented: dict[str, float]) -> dict[str, float]:
  return plain | {f"RA/{name}": value for name, value in augmented.items()}


def _intervals(per_query: dict[str, metrics.QueryMetrics], resamples: int) -> dict[str, dict[str, tuple[float, float]]]:
  return {
    name: bootstrap_intervals(values, resamples=resamples) if resamples else {} for name, values in per_query.items()
  }
