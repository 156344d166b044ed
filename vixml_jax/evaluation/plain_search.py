"""Evaluates plain search alone, in any index of labels."""

from collections.abc import Sequence

import numpy as np

from vixml_jax.evaluation.evaluator import QUERIES_PER_BLOCK, EvaluationQueries
from vixml_jax.evaluation.metrics import QueryMetrics, query_metrics
from vixml_jax.search.index import Index, search_excluding


def search_metrics(
  index: Index,
  queries: EvaluationQueries,
  propensity: np.ndarray,
  precision_ks: Sequence[int],
  recall_ks: Sequence[int],
) -> QueryMetrics:
  """Returns the metrics of plain search in an index; all processes must call this together.

  Args:
    index: the labels.
    queries: the queries.
    propensity: inverse propensities [L].
    precision_ks: k of P, nDCG, PSP and PSnDCG.
    recall_ks: k of recall.
  """
  parts, depth = [], max(*precision_ks, *recall_ks)
  for _, block in queries.blocks(QUERIES_PER_BLOCK):
    _, ids = search_excluding(index, np.asarray(block.embeddings), depth, block.filter)
    parts.append(query_metrics(ids, block.labels, propensity, precision_ks=precision_ks, recall_ks=recall_ks))
  return QueryMetrics.concatenate(parts)
