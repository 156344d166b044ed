"""Queries that the report shows with their rankings: random ones, and those with the worst and the best results."""

import dataclasses

import numpy as np

from vixml_jax.evaluation.evaluator import EvaluationConfig, EvaluationIndex, EvaluationQueries
from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.evaluation.results import Evaluation
from vixml_jax.ragged import Ragged

NUM_EXTREMES = 9
"""Number of queries with the worst results that are shown, and of those with the best."""


@dataclasses.dataclass(frozen=True)
class ShownQueries:
  """Queries with their rankings.

  Attributes:
    title: What they have in common.
    queries: Numbers of the evaluated queries, int64 [E].
    labels: Positives, E rows.
    ids: Labels found, int32 [E, K], of each row of the results.
    scores: Their scores, float32 [E, K].
  """

  title: str
  queries: np.ndarray
  labels: Ragged
  ids: dict[str, np.ndarray]
  scores: dict[str, np.ndarray]


def shown_queries(
  result: Evaluation, index: EvaluationIndex, queries: EvaluationQueries, config: EvaluationConfig
) -> list[ShownQueries]:
  """Returns the random examples of an evaluation, the queries with the worst results, and those with the best.

  Worst and best are those of the last row of the results by nDCG. All processes must call this together.

  Args:
    result: Results of all queries.
    index: What was searched.
    queries: The evaluated queries.
    config: How they were evaluated.
  """
  groups = [ShownQueries("random", result.examples, queries.labels.take(result.examples), result.ids, result.scores)]
  last = list(result.per_query.values())[-1]
  for title, rows in extreme_queries(last, queries.labels.lengths).items():
    if len(rows):
      _, block = next(queries.take(rows).blocks(len(rows)))
      found, _ = index.rankings(block, config)
      ids, scores = ({name: pair[place] for name, pair in found.items()} for place in (1, 0))
      groups.append(ShownQueries(title, rows, block.labels, ids, scores))
  return groups


def extreme_queries(metrics: QueryMetrics, num_labels: np.ndarray) -> dict[str, np.ndarray]:
  """Returns the queries of lowest and of highest nDCG, as "worst" and "best".

  Among equals, queries with more labels come first, then those with lower numbers. Queries without labels are left out.

  Args:
    metrics: Metrics of Q queries.
    num_labels: Number of labels of each query, int [Q].
  """
  (*_, name) = (name for name in metrics.names if name.startswith("nDCG@"))
  values = metrics.numerators[:, metrics.names.index(name)]
  labeled = np.flatnonzero(num_labels)
  found = {}
  for title, sign in (("worst", 1), ("best", -1)):
    order = np.lexsort((labeled, -num_labels[labeled], sign * values[labeled]))
    found[title] = labeled[order[: min(NUM_EXTREMES, len(labeled) // 2)]]
  return found
