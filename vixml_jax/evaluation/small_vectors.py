"""Evaluates smaller vectors: plain search with fewer dimensions, in float32, in int8 and in bits."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.evaluation.evaluator import EvaluationQueries
from vixml_jax.evaluation.plain_search import search_metrics
from vixml_jax.search.index import rows_on_host
from vixml_jax.search.vector_codes import DTYPES
from vixml_jax.search.vector_form import VectorForm
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage

PRECISION_K, RECALL_K = 1, 100
METRICS = (f"P@{PRECISION_K}", f"R@{RECALL_K}")
"""Metrics of smaller vectors, in percent."""
TRAINED = -1
"""Stands for the numbers of dimensions that a model was trained for."""
BYTES = "bytes per label"
"""Size of a label's vector in the memory that is searched."""


def chosen_dims(wanted: Sequence[int], trained: Sequence[int]) -> tuple[int, ...]:
  """Returns the numbers of dimensions to evaluate, each once.

  >>> chosen_dims((-1, 24), (96, 48)), chosen_dims((-1,), ())
  ((96, 48, 24), ())

  Args:
    wanted: Numbers of dimensions (`eval.small_vectors`); -1 stands for those that the model was trained for.
    trained: The latter (`train.matryoshka_dims`).
  """
  return tuple(dict.fromkeys(dims for each in wanted for dims in (trained if each == TRAINED else (each,))))


def evaluate_small_vectors(
  dims: Sequence[int], vectors: ShardedRows | np.ndarray, queries: EvaluationQueries, propensity: np.ndarray
) -> dict[str, dict[str, float]]:
  """Returns metrics and size of each number of dimensions in each type, by names such as "dims128/int8".

  Every process copies the vectors to its host, as a file of an index has them, and searches on its own devices.

  Args:
    dims: Numbers of dimensions, each at most D; without any, nothing is done.
    vectors: [L, D], vectors of labels.
    queries: The queries; all processes must call this together.
    propensity: Inverse propensities [L].
  """
  if not dims:
    return {}
  labels = rows_on_host(vectors) if isinstance(vectors, ShardedRows) else vectors
  mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
  results = {}
  for count in dims:
    for dtype in DTYPES:
      form = VectorForm(dtype, count)
      with stage(f"evaluate {len(queries):,} queries with {count} dimensions in {dtype}"):
        index = form.make_index(labels, mesh)
        means = search_metrics(index, queries, propensity, (PRECISION_K,), (RECALL_K,)).mean()
      size = {BYTES: float(form.bytes_per_label(labels.shape[1]))}
      results[f"dims{count}/{dtype}"] = {name: means[name] for name in METRICS} | size
  return results
