"""The memory of one process on its host, by formula: the arrays that a run keeps there."""

import math

import jax

from vixml_jax.ahead_of_time.plan import Plan, bytes_a_chip
from vixml_jax.evaluation.evaluate_model import evaluation_config
from vixml_jax.evaluation.evaluator import QUERIES_PER_BLOCK

_LIBRARIES = 1.0 * 2**30  # A process that has imported everything and compiled its programs (measured on a CPU).
_INT, _LONG, _FLOAT, _HALF = 4, 8, 4, 2


def host_memory(plan: Plan) -> dict[str, float]:
  """Returns the bytes of each kind of array that a process keeps on its host.

  Values of tokens, labels and features are memory-mapped files. They count as if they were read whole, although the
  system may drop their pages at any time. Embeddings pass through the host in blocks.

  Args:
    plan: The plan.

  Returns:
    Bytes by what they are for.
  """
  config, size = plan.workload.config, plan.workload.size
  evaluation = evaluation_config(config.eval)
  items = size.train + size.test + size.labels
  pairs = size.train * size.labels_per_query
  metrics = 4 * len(evaluation.ks) + len(evaluation.recall_ks)
  rows = 1 if evaluation.retrieval is None else 2
  width = max(evaluation.depth, 0 if evaluation.retrieval is None else evaluation.retrieval.hits)
  memory = {
    "Python, JAX and compiled programs": _LIBRARIES,
    "tokens of all texts": items * (size.tokens * _INT + _LONG),
    # Once by query and once by label, and the permutation from one to the other.
    "labels of queries": 2 * pairs * _INT + pairs * 2 * _LONG + (size.train + size.labels) * 2 * _LONG,
    "order and clusters of queries": size.train * (2 * _LONG + 3 * _INT),
    "batches": 3 * bytes_a_chip(plan.batch.inputs) * plan.mesh_plan.data * plan.mesh_plan.fsdp,
    "metrics of every query": rows * max(size.test, 1) * 2 * metrics * _FLOAT,
    "a block of search results": QUERIES_PER_BLOCK * (width * 4 * (_INT + _FLOAT) + plan.workload.model.embed_dim * 8),
    "copy of the state while a checkpoint is written": _copied(plan),
  }
  if config.images:
    memory["image features"] = 0.0
    if plan.batch.image_features is None:
      memory["image features"] = float(size.num_images * config.features.dim * _HALF)
    memory["numbers of the images"] = math.ceil(items * (size.images * _INT + _LONG))
  return memory


def _copied(plan: Plan) -> float:
  """Returns the bytes of the state that a process writes: what its chips hold, each value once."""
  chips = min(len(plan.where.devices), plan.where.chips_per_host)
  return float(
    sum(
      min(math.prod(leaf.shape) * leaf.dtype.itemsize, chips * bytes_a_chip(leaf))
      for leaf in jax.tree.leaves(plan.state)
    )
  )
