"""Evaluates embedded queries against labels: plain search, retrieval augmentation, deciles, intervals.

Queries are searched and scored block by block. Of each query, only its metrics are kept; rankings are kept for the few
queries that a report shows.
"""

from collections.abc import Iterator
import dataclasses
import functools
import logging
import math

from jax.sharding import Mesh
import numpy as np
import scipy.sparse

from vixml_jax.blend.ranking import ScoredCandidates
from vixml_jax.evaluation import metrics, tuning
from vixml_jax.evaluation.blend_row import BlendCounts, BlendRanker
from vixml_jax.evaluation.confusions import ConfusionCounts
from vixml_jax.evaluation.results import Evaluation, intervals_of
from vixml_jax.ragged import Ragged
from vixml_jax.rounding import at_equal_distances
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
MOST_CONFUSIONS = 50
"""Number of pairs of labels that are kept of those that are confused."""
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
    words: TF-IDF vectors of the queries [Q, F], which the blend needs; None without it.
  """

  embeddings: ShardedRows | np.ndarray
  labels: Ragged
  filter: Ragged
  words: scipy.sparse.csr_array | None = None

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, rows: np.ndarray) -> "EvaluationQueries":
    """Returns a few of the queries on the host, by their numbers int [R]; all processes must call this together."""
    embeddings = self.embeddings.take(rows) if isinstance(self.embeddings, ShardedRows) else self.embeddings[rows]
    words = None if self.words is None else self.words[rows]
    return EvaluationQueries(np.asarray(embeddings), self.labels.take(rows), self.filter.take(rows), words)

  def blocks(self, size: int) -> Iterator[tuple[np.ndarray, "EvaluationQueries"]]:
    """Yields the numbers of the queries of each block, and the block on the host."""
    for start in range(0, len(self), size):
      rows = np.arange(start, min(start + size, len(self)))
      if isinstance(self.embeddings, ShardedRows):
        embeddings = np.asarray(self.embeddings.block(start, min(size, len(self))))[: len(rows)]
      else:
        embeddings = self.embeddings[rows]
      words = None if self.words is None else self.words[rows[0] : rows[-1] + 1]
      yield rows, EvaluationQueries(embeddings, self.labels.take(rows), self.filter.take(rows), words)


@dataclasses.dataclass(frozen=True)
class EvaluationIndex:
  """Labels and training queries to search; each index is built at its first search and then kept.

  Attributes:
    label_vectors: float32 [L, D], vectors of labels by inner product; on the devices, or on the host.
    train_embeddings: float32 [N, D], embeddings of training queries, for retrieval augmentation; as above.
    train_labels: labels of these training queries, N rows.
    inverse_propensity: float64 [L], for PSP.
    search: "exact" or "scann".
    mesh: devices of exact search.
    known: bool [N], the training queries that may be found; None for all.
    goal: recall that ScaNN must reach; None takes its settings of search by rules of thumb.
    blend: the trained blend of these labels and training queries; None for no such row.
  """

  label_vectors: ShardedRows | np.ndarray
  train_embeddings: ShardedRows | np.ndarray
  train_labels: Ragged
  inverse_propensity: np.ndarray
  search: str
  mesh: Mesh
  known: np.ndarray | None = None
  goal: RecallGoal | None = None
  blend: BlendRanker | None = None

  @functools.cached_property
  def label_index(self) -> Index:
    """Index of the labels.

    Raises:
      InputError: the search cannot run here; so does `query_index`.
    """
    return make_index(self.search, self.label_vectors, self.mesh, goal=self.goal)

  @functools.cached_property
  def query_index(self) -> Index:
    """Index of the training queries."""
    return make_index(self.search, self.train_embeddings, self.mesh, allowed=self.known, goal=self.goal)

  @functools.cached_property
  def scann_index(self) -> Index | None:
    """ScaNN over the labels, to compare with exact search.

    None if ScaNN searches already, cannot run here, or needs more than 2 GiB for their vectors alone.
    """
    if self.search != "exact" or not scann_available()[0]:
      return None
    size = math.prod(self.label_vectors.shape) * 4
    if size > _SCANN_BYTES:
      _log.info(
        "ScaNN is not compared with exact search, since it needs more than %.1f GiB on the host; to search with it, "
        "run python -m vixml_jax.evaluate --search=scann",
        size / 2**30,
      )
      return None
    return make_index("scann", self.label_vectors, self.mesh, goal=self.goal)

  def search_both(self, embeddings: np.ndarray, label_hits: int, query_hits: int) -> Neighbors:
    """Returns the nearest labels and the nearest training queries of queries [Q, D]."""
    labels = self.label_index.search(embeddings, label_hits)
    if not query_hits:
      nothing = np.zeros((len(embeddings), 0), np.float32)
      return Neighbors(*labels, nothing, nothing.astype(np.int32))
    return Neighbors(*labels, *self.query_index.search(embeddings, query_hits))

  def neighbors(self, embeddings: np.ndarray, settings: RetrievalSettings) -> Neighbors:
    """Returns the results of the two searches of retrieval-augmented inference, of queries [Q, D]."""
    found = self.search_both(embeddings, settings.hits, settings.num_query_hits)
    return settings.kept(found)

  def rankings(
    self, queries: EvaluationQueries, config: EvaluationConfig
  ) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], ScoredCandidates | None]:
    """Returns scores and ids [Q, depth] of a block of queries on the host, by row, and the candidates of the blend.

    The rows are "plain", "augmented" if the config asks for it, and "blend" if there is one. One search serves all.
    """
    retrieval, blend = config.retrieval, self.blend
    num_labels = self.label_index.num_labels
    width = search_width(config.depth, queries.filter, num_labels)
    asked = [(width, 0)]
    if retrieval is not None:
      asked.append((retrieval.hits, retrieval.num_query_hits))
    if blend is not None:
      widths = blend.index.widths
      asked.append((search_width(widths.labels, queries.filter, num_labels), widths.queries))
    embeddings = np.asarray(queries.embeddings)
    found = self.search_both(embeddings, *(max(hits) for hits in zip(*asked, strict=True)))
    plain = found.first(width, 0)
    rows = {"plain": drop_members(plain.label_scores, plain.label_ids, queries.filter, config.depth)}
    if retrieval is not None:
      nearest = found.first(retrieval.hits, retrieval.num_query_hits)
      rows["augmented"] = combine(
        retrieval.kept(nearest),
        self.train_labels,
        num_labels=len(self.inverse_propensity),
        lambda_=retrieval.lambda_,
        temperature=retrieval.temperature,
        k=config.depth,
        exclude=queries.filter,
      )
    if blend is None:
      return rows, None
    assert queries.words is not None
    described = blend.index.described(embeddings, found, queries.words, exclude=queries.filter)
    scored = ScoredCandidates.score(blend.model, *described)
    rows["blend"] = scored.ranked(config.depth, self.inverse_propensity)
    return rows, scored


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
  chosen = at_equal_distances(len(held_out), MOST_HELD_OUT)
  parts = []
  for rows, block in held_out.blocks(QUERIES_PER_BLOCK):
    wanted = chosen[(chosen >= rows[0]) & (chosen <= rows[-1])] - rows[0]
    if len(wanted):
      parts.append(index.neighbors(np.asarray(block.embeddings)[wanted], settings))
  best, tried = tuning.choose(
    Neighbors.concatenate(parts),
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
  """Evaluates plain search, retrieval-augmented inference if the config asks for it, and the blend of the index.

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
  names = ["plain", *(["augmented"] if config.retrieval else []), *(["blend"] if index.blend else [])]
  rows = {name: _Row(index, config, frequencies) for name in names}
  blend = BlendCounts(index.inverse_propensity)
  overlaps = {k: np.zeros(2, np.int64) for k in (config.recall_ks if index.scann_index is not None else ())}
  with stage(f"evaluate {len(queries):,} queries", total=len(queries), unit="query") as progress:
    for numbers, block in queries.blocks(QUERIES_PER_BLOCK):
      found, scored = index.rankings(block, config)
      if scored is not None:
        blend.add(scored, block.labels)
      kept = examples[(examples >= numbers[0]) & (examples <= numbers[-1])] - numbers[0]
      for name, (scores, ids) in found.items():
        rows[name].add(scores, ids, block.labels, kept)
      if index.scann_index is not None:
        _, approximate = search_excluding(index.scann_index, np.asarray(block.embeddings), config.depth, block.filter)
        for k in overlaps:
          overlaps[k] += overlap_counts(approximate[:, :k], found["plain"][1][:, :k])
      progress.advance(len(block))
    per_query = {name: metrics.QueryMetrics.concatenate(row.per_query) for name, row in rows.items()}
    intervals = intervals_of(per_query, config.bootstrap_samples)
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
    confusions={name: row.confusions.most(MOST_CONFUSIONS) for name, row in rows.items()},
    blend=None if index.blend is None else blend.results(per_query["blend"].mean()),
  )


class _Row:
  """What is kept of the rankings of one row of the results.

  Attributes:
    per_query: metrics of each block.
    frequencies: hits and positives by label frequency.
    confusions: labels that are wrongly ranked first.
    ids: labels found for the examples of each block.
    scores: scores of these.
  """

  def __init__(self, index: EvaluationIndex, config: EvaluationConfig, frequencies: np.ndarray):
    self._propensity, self._config = index.inverse_propensity, config
    self.per_query: list[metrics.QueryMetrics] = []
    self.frequencies = metrics.FrequencyCounts(frequencies, config.ks, config.recall_ks)
    self.confusions = ConfusionCounts(len(frequencies))
    self.ids: list[np.ndarray] = []
    self.scores: list[np.ndarray] = []

  def add(self, scores: np.ndarray, ids: np.ndarray, labels: Ragged, kept: np.ndarray) -> None:
    """Adds a block of queries; the rankings of the queries `kept` stay."""
    ks, recall_ks = self._config.ks, self._config.recall_ks
    self.per_query.append(metrics.query_metrics(ids, labels, self._propensity, precision_ks=ks, recall_ks=recall_ks))
    self.frequencies.add(ids, labels)
    self.confusions.add(ids[:, 0], labels)
    self.ids.append(ids[kept])
    self.scores.append(scores[kept])
