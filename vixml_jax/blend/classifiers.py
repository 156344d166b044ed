"""One classifier for each label, trained on the embeddings of training queries, which stay as they are.

The encoder is not changed, so that training takes seconds to minutes: an epoch costs 4 N L D operations. Head and loss
are those of `label_classifiers`.
"""

from collections.abc import Callable
import functools
import logging
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from vixml_jax import sharding
from vixml_jax.label_classifiers import (
  SCALE,
  ClassifierState,
  classifier_shardings,
  new_classifiers,
  prefix_softmax,
  updated,
)
from vixml_jax.ragged import Ragged, padded_ids
from vixml_jax.rounding import next_power_of_two
from vixml_jax.sharded_rows import ShardedRows, take_rows
from vixml_jax.stages import stage

LEARNING_RATE = 0.02
"""Learning rate of Adam in the first step; it falls linearly to 0."""
BATCH_SIZE = 512
_PAIRS_PER_BLOCK = 8192

_log = logging.getLogger(__name__)


def fit_classifiers(
  embeddings: ShardedRows,
  labels_of_queries: Ragged,
  num_labels: int,
  *,
  epochs: int,
  seed: int,
  dims: tuple[int, ...] = (),
  batch_size: int = BATCH_SIZE,
) -> ShardedRows:
  """Returns the classifiers of all labels, float32 [L, D + 1].

  The row of a label without training queries is NaN: its classifier would only learn to score low.

  Args:
    embeddings: float32 [N, D] at unit length, embeddings of training queries.
    labels_of_queries: Positives of each query, N rows; queries without any are left out.
    num_labels: L.
    epochs: Number of times that each query is used.
    seed: Decides the order of queries.
    dims: Lengths of the prefixes of embeddings that are trained; empty for whole embeddings.
    batch_size: Number of queries of a step; the scores of a step need `4 * batch_size * L` bytes on all devices
      together, a few times.
  """
  mesh = embeddings.mesh
  rows = np.flatnonzero(labels_of_queries.lengths)
  size = min(batch_size, next_power_of_two(max(len(rows), 1)))
  steps = epochs * math.ceil(len(rows) / size)
  whole = sharding.named_sharding(mesh)
  zeros = functools.partial(new_classifiers, num_labels, embeddings.shape[1])
  state = jax.jit(zeros, out_shardings=classifier_shardings(mesh))()
  rng, done = np.random.default_rng(seed), 0
  loss: jax.Array | None = None
  with stage(f"train classifiers of {num_labels:,} labels", total=epochs * len(rows), unit="item") as progress:
    for _ in range(epochs):
      order = rng.permutation(rows)
      for start in range(0, len(order), size):
        part = order[start : start + size]
        queries = np.pad(part, (0, size - len(part)), constant_values=-1)
        before = loss
        state, loss = classifier_step(
          state,
          embeddings.values,
          sharding.to_global(queries.astype(np.int32), whole),
          sharding.to_global(_positives(labels_of_queries, part, size), whole),
          np.float32(LEARNING_RATE * (1 - done / steps)),
          num_labels=num_labels,
          mesh=mesh,
          dims=dims,
        )
        # One step in flight hides the host's work. Many would keep their batches in memory, and the collectives of CPU
        # devices that share the threads of a busy host may then wait for each other forever.
        if before is not None:
          before.block_until_ready()
        done += 1
        progress.advance(len(part))
    jax.block_until_ready(state)
  if loss is not None:
    _log.info("classifiers: loss of the last batch %.4f", float(loss))
  trained = np.zeros(len(state.classifiers), bool)
  trained[labels_of_queries.values] = True
  placed = sharding.to_global(trained, sharding.named_sharding(mesh, "label"))
  return ShardedRows(_only_trained(state.classifiers, placed), num_labels)


@functools.partial(jax.jit, donate_argnums=0)
def _only_trained(classifiers: jax.Array, trained: jax.Array) -> jax.Array:
  return jnp.where(trained[:, None], classifiers, jnp.nan)


def candidate_scores(
  classifiers_of: Callable[[np.ndarray], np.ndarray], candidates: Ragged, embeddings: np.ndarray
) -> np.ndarray:
  """Returns the score of each candidate by its classifier, float32 [P]; NaN for a label without a classifier.

  Args:
    classifiers_of: Function of label ids [M] that returns their classifiers [M, D + 1].
    candidates: Candidates of Q queries, P in total.
    embeddings: Embeddings of the queries at unit length, [Q, D].
  """
  scores = np.empty(len(candidates.values), np.float32)
  queries = candidates.row_ids()
  for start in range(0, len(scores), _PAIRS_PER_BLOCK):
    block = slice(start, min(start + _PAIRS_PER_BLOCK, len(scores)))
    ids = candidates.values[block]
    wanted = np.pad(ids, (0, _PAIRS_PER_BLOCK - len(ids)), constant_values=ids[-1])  # One shape: one compiled program.
    found = classifiers_of(wanted)[: len(ids)]
    products = np.einsum("pd,pd->p", found[:, :-1], embeddings[queries[block]])
    scores[block] = SCALE * products + found[:, -1]
  return scores


def _positives(labels_of_queries: Ragged, part: np.ndarray, size: int) -> np.ndarray:
  """Returns the positives of a batch, int32 [size, P], P a power of two; -1 fills the rows."""
  found = labels_of_queries.take(part)
  return padded_ids(found, size, next_power_of_two(max(int(found.lengths.max(initial=0)), 1)))


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("num_labels", "mesh", "dims"))
def classifier_step(
  state: ClassifierState,
  embeddings: jax.Array,
  queries: jax.Array,
  positives: jax.Array,
  learning_rate: jax.Array,
  *,
  num_labels: int,
  mesh: Mesh,
  dims: tuple[int, ...] = (),
) -> tuple[ClassifierState, jax.Array]:
  """Returns the state after a step of Adam, and the loss before it.

  Args:
    state: The state before.
    embeddings: [N rounded up, D], sharded by rows.
    queries: int32 [B], queries of the batch, -1 for none.
    positives: int32 [B, P], their positives, -1 for none.
    learning_rate: Learning rate of this step.
    num_labels: L.
    mesh: The devices.
    dims: Lengths of the prefixes that are trained; empty for whole embeddings.
  """
  taken = take_rows(embeddings, queries, mesh)
  loss, gradient = jax.value_and_grad(prefix_softmax)(state.classifiers, taken, positives, num_labels, mesh, dims)
  return updated(state, gradient, learning_rate), loss
