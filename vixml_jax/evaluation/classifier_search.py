"""Evaluates the search of labels by their classifiers alone."""

import jax
import jax.numpy as jnp
import numpy as np

from vixml_jax.evaluation.evaluator import QUERIES_PER_BLOCK, EvaluationConfig, EvaluationQueries
from vixml_jax.evaluation.metrics import QueryMetrics, query_metrics
from vixml_jax.label_classifiers import SCALE
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import search_excluding
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage

CLASSIFIER_ROW = "classifiers of labels"
"""Name of the row in tables."""
_LOWEST = -1e4  # Score of a label without a classifier.


def evaluate_classifiers(
  classifiers: ShardedRows, queries: EvaluationQueries, propensity: np.ndarray, config: EvaluationConfig
) -> dict[str, float]:
  """Returns the metrics of the ranking of all labels by the scores of their classifiers, in percent.

  The score is an inner product of D + 1 numbers: the last one of a query is 1, for the bias.

  Args:
    classifiers: [L, D + 1], see `label_classifiers`; NaN for a label without one, which is ranked last.
    queries: The queries; all processes must call this together.
    propensity: Inverse propensities [L].
    config: Which metrics to compute.
  """
  scaled = ShardedRows(_scaled(classifiers.values), len(classifiers))
  index, parts = ExactIndex(scaled, classifiers.mesh), []
  with stage(f"evaluate {len(queries):,} queries by classifiers"):
    for _, block in queries.blocks(QUERIES_PER_BLOCK):
      embeddings = np.asarray(block.embeddings)
      extended = np.concatenate([embeddings, np.ones((len(embeddings), 1), np.float32)], axis=1)
      _, ids = search_excluding(index, extended, config.depth, block.filter)
      parts.append(query_metrics(ids, block.labels, propensity, precision_ks=config.ks, recall_ks=config.recall_ks))
  return QueryMetrics.concatenate(parts).mean()


@jax.jit
def _scaled(classifiers: jax.Array) -> jax.Array:
  scaled = classifiers * jnp.full(classifiers.shape[1], SCALE, jnp.float32).at[-1].set(1)
  missing = jnp.zeros(classifiers.shape[1], jnp.float32).at[-1].set(_LOWEST)
  return jnp.where(jnp.isnan(scaled), missing, scaled)
