"""One classifier for each label, trained on the embeddings of training queries, which stay as they are.

The encoder is not changed, so that training takes seconds to minutes: an epoch costs 4 N L D operations. The head is
that of Renee (Jain et al., MLSys 2023); the loss is the decoupled softmax of DEXML (Gupta et al., ICLR 2024, arXiv
2310.10636): each positive competes with all labels that are not positives of the query.

The classifier of a label is a row [D + 1]: its vector and its bias. The score of a query is the inner product with its
embedding, plus the bias.
"""

from collections.abc import Callable
import functools
import logging
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np
import optax

from vixml_jax import sharding
from vixml_jax.ragged import Ragged, padded
from vixml_jax.rounding import next_power_of_two
from vixml_jax.sharded_rows import ShardedRows, take_rows, zeros
from vixml_jax.stages import stage

LEARNING_RATE = 0.02
"""Learning rate of Adam in the first step; it falls linearly to 0."""
SCALE = 10.0
"""What embeddings of unit length are multiplied by, so that scores have the range that probabilities need."""
BATCH_SIZE = 512
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)
_PAIRS_PER_BLOCK = 8192

_log = logging.getLogger(__name__)


class ClassifierState(NamedTuple):
  """Classifiers [L rounded up, D + 1], and the state of Adam; all sharded by rows over the devices."""

  classifiers: jax.Array
  adam: optax.ScaleByAdamState


def fit_classifiers(
  embeddings: ShardedRows,
  labels_of_queries: Ragged,
  num_labels: int,
  *,
  epochs: int,
  seed: int,
  batch_size: int = BATCH_SIZE,
) -> ShardedRows:
  """Returns the classifiers of all labels, float32 [L, D + 1].

  The classifier of a label without training queries only learns to score low.

  Args:
    embeddings: float32 [N, D] at unit length, embeddings of training queries.
    labels_of_queries: Positives of each query, N rows; queries without any are left out.
    num_labels: L.
    epochs: Number of times that each query is used.
    seed: Decides the order of queries.
    batch_size: Number of queries of a step; the scores of a step need `4 * batch_size * L` bytes on all devices
      together, a few times.
  """
  mesh = embeddings.mesh
  rows = np.flatnonzero(labels_of_queries.lengths)
  size = min(batch_size, next_power_of_two(max(len(rows), 1)))
  steps = epochs * math.ceil(len(rows) / size)
  classifiers, mean, variance = (zeros(num_labels, embeddings.shape[1] + 1, mesh).values for _ in range(3))
  whole = sharding.named_sharding(mesh)
  state = ClassifierState(
    classifiers, optax.ScaleByAdamState(sharding.to_global(np.zeros((), np.int32), whole), mean, variance)
  )
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
          sharding.to_global(_positives(labels_of_queries, queries), whole),
          np.float32(LEARNING_RATE * (1 - done / steps)),
          num_labels=num_labels,
          mesh=mesh,
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
  return ShardedRows(state.classifiers, num_labels)


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


def _positives(labels_of_queries: Ragged, queries: np.ndarray) -> np.ndarray:
  """Returns the positives of a batch, int32 [B, P], P a power of two; -1 fills the rows."""
  lengths = np.where(queries >= 0, labels_of_queries.lengths[queries], 0)
  found = labels_of_queries.take(queries[queries >= 0])
  rows = padded(found, found.values.astype(np.int32), -1)
  width = next_power_of_two(max(int(lengths.max(initial=0)), 1))
  return np.pad(rows, ((0, len(queries) - len(rows)), (0, width - rows.shape[1])), constant_values=-1)


@functools.partial(jax.jit, donate_argnums=0, static_argnames=("num_labels", "mesh"))
def classifier_step(
  state: ClassifierState,
  embeddings: jax.Array,
  queries: jax.Array,
  positives: jax.Array,
  learning_rate: jax.Array,
  *,
  num_labels: int,
  mesh: Mesh,
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
  """
  inputs = SCALE * take_rows(embeddings, queries, mesh)
  gradient, loss = _gradient_and_loss(state.classifiers, inputs, positives, num_labels, mesh)
  update, adam = _ADAM.update(gradient, state.adam)
  return ClassifierState(state.classifiers - learning_rate * update, adam), loss


def _gradient_and_loss(
  classifiers: jax.Array, inputs: jax.Array, positives: jax.Array, num_labels: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradient of the mean loss of all pairs, sharded as the classifiers, and this loss.

  The loss of a pair of a query and a positive is ln(1 + exp(n - s)), where s is the score of the positive, and n the
  logarithm of the sum of exp(score) over all labels that are not positives of the query. Each device computes the
  scores [B, L'] of its own labels; only sums over labels are exchanged.

  Args:
    classifiers: [L rounded up, D + 1], sharded by rows.
    inputs: [B, D], on every device.
    positives: int32 [B, P], on every device.
    num_labels: L.
    mesh: The devices.
  """
  axes = sharding.row_axes()

  def share(classifiers: jax.Array, inputs: jax.Array, positives: jax.Array) -> tuple[jax.Array, jax.Array]:
    count = len(classifiers)
    first = lax.axis_index(axes) * count
    scores = inputs @ classifiers[:, :-1].T + classifiers[:, -1]
    queries, given = jnp.arange(len(inputs))[:, None], positives >= 0
    local = positives - first
    here = given & (local >= 0) & (local < count)
    # An index after the last column is dropped; a negative one would count from the end.
    columns = jnp.where(here, local, count)
    is_positive = jnp.zeros(scores.shape, bool).at[queries, columns].set(True, mode="drop")
    is_negative = ~is_positive & (first + jnp.arange(count) < num_labels)
    negatives = jnp.where(is_negative, scores, -jnp.inf)
    highest = lax.pmax(negatives.max(axis=1, keepdims=True), axes)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(negatives - highest)
    total = lax.psum(weights.sum(axis=1, keepdims=True), axes)
    of_positives = lax.psum(jnp.where(here, scores[queries, jnp.minimum(columns, count - 1)], 0), axes)
    margins = highest + jnp.log(total) - of_positives
    pairs = jnp.maximum(given.sum(), 1)
    loss = jnp.where(given, jax.nn.softplus(margins), 0).sum() / pairs
    # The derivative of the loss of each pair by n; that by s is its negative.
    slopes = jnp.where(given, jax.nn.sigmoid(margins), 0) / pairs
    by_score = slopes.sum(axis=1, keepdims=True) * weights / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    by_score = by_score.at[queries, columns].add(-slopes, mode="drop")
    return jnp.concatenate([by_score.T @ inputs, by_score.sum(axis=0)[:, None]], axis=1), loss

  split, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(share, mesh=mesh, in_specs=(split, whole, whole), out_specs=(split, whole), check_vma=False)(
    classifiers, inputs, positives
  )
