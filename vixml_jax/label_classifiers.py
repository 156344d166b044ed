"""A linear classifier for each label, and the loss of queries against the classifiers of all labels.

The head is that of Renee (Jain et al., MLSys 2023). The loss is the decoupled softmax of DEXML (Gupta et al., ICLR
2024, arXiv 2310.10636): each positive competes with all labels that are not positives of the query.

The classifier of a label is a row [D + 1]: its vector and its bias. The score of a query is `SCALE` times the inner
product with its embedding, plus the bias. Classifiers and their scores are divided among the devices by labels, so that
no device has all of them.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import optax

from vixml_jax import sharding

SCALE = 10.0
"""What embeddings of unit length are multiplied by, so that scores have the range that probabilities need."""
_ADAM = optax.scale_by_adam(b1=0.9, b2=0.99)


class ClassifierState(NamedTuple):
  """Classifiers [L rounded up, D + 1], and the state of Adam; all sharded by rows over the devices."""

  classifiers: jax.Array
  adam: optax.ScaleByAdamState


def new_classifiers(num_labels: int, embed_dim: int) -> ClassifierState:
  """Returns the state before the first step: zeros, as a function that can be traced.

  Args:
    num_labels: L.
    embed_dim: D.
  """
  classifiers = jnp.zeros((sharding.padded_rows(num_labels), embed_dim + 1), jnp.float32)
  return ClassifierState(classifiers, _ADAM.init(classifiers))


def classifier_shardings(mesh: Mesh) -> ClassifierState:
  """Returns the shardings of a state, where its arrays are."""
  rows: Any = sharding.named_sharding(mesh, "label", "vector")
  return ClassifierState(rows, optax.ScaleByAdamState(sharding.named_sharding(mesh), rows, rows))


def updated(state: ClassifierState, gradient: jax.Array, learning_rate: jax.Array) -> ClassifierState:
  """Returns the state after a step of Adam."""
  update, adam = _ADAM.update(gradient, state.adam)
  return ClassifierState(state.classifiers - learning_rate * update, adam)


def prefix_softmax(
  classifiers: jax.Array,
  queries: jax.Array,
  positives: jax.Array,
  num_labels: int,
  mesh: Mesh,
  dims: tuple[int, ...] = (),
) -> jax.Array:
  """Returns the mean of `decoupled_softmax` over prefixes, so that fewer dimensions can be searched by themselves.

  The prefix of a query is normalized again; that of a classifier is not, and has the same bias at each length
  (Matryoshka representation learning, arXiv 2205.13147).

  `dims` are the lengths of the prefixes, each at most D; empty for whole vectors. The other arguments are those of
  `gradients_and_loss`.
  """
  losses = []
  for dim in dims or (queries.shape[1],):
    own, part = classifiers, queries
    if dim < queries.shape[1]:
      own = jnp.concatenate([classifiers[:, :dim], classifiers[:, -1:]], axis=1)
      part = queries[:, :dim]
      part = part * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(part), axis=1, keepdims=True), 1e-24))
    losses.append(decoupled_softmax(own, part, positives, num_labels, mesh))
  return jnp.mean(jnp.stack(losses))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def decoupled_softmax(
  classifiers: jax.Array, queries: jax.Array, positives: jax.Array, num_labels: int, mesh: Mesh
) -> jax.Array:
  """Returns the mean loss of all pairs of a query and a positive.

  It can be differentiated by classifiers and queries. The arguments are those of `gradients_and_loss`.
  """
  return gradients_and_loss(classifiers, queries, positives, num_labels, mesh)[2]


def _forward(
  classifiers: jax.Array, queries: jax.Array, positives: jax.Array, num_labels: int, mesh: Mesh
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  *gradients, loss = gradients_and_loss(classifiers, queries, positives, num_labels, mesh)
  return loss, (gradients[0], gradients[1])


def _backward(
  num_labels: int, mesh: Mesh, gradients: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  del num_labels, mesh
  return slope * gradients[0], slope * gradients[1], None


decoupled_softmax.defvjp(_forward, _backward)


def gradients_and_loss(
  classifiers: jax.Array, queries: jax.Array, positives: jax.Array, num_labels: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of the mean loss of all pairs by classifiers, sharded as they are, and by queries; the loss.

  The loss of a pair of a query and a positive is ln(1 + exp(n - s)), where s is the score of the positive, and n the
  logarithm of the sum of exp(score) over all labels that are not positives of the query. Each device computes the
  scores [B, L'] of its own labels; only sums over labels are exchanged.

  Args:
    classifiers: [L rounded up, D + 1], sharded by rows.
    queries: Embeddings at unit length, [B, D], on every device.
    positives: int32 [B, P], on every device.
    num_labels: L.
    mesh: The devices.
  """
  axes = sharding.row_axes()

  def share(classifiers: jax.Array, inputs: jax.Array, positives: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    count = len(classifiers)
    first = lax.axis_index(axes) * count
    scores = inputs @ classifiers[:, :-1].T + classifiers[:, -1]
    rows, given = jnp.arange(len(inputs))[:, None], positives >= 0
    local = positives - first
    here = given & (local >= 0) & (local < count)
    # An index after the last column is dropped; a negative one would count from the end.
    columns = jnp.where(here, local, count)
    is_positive = jnp.zeros(scores.shape, bool).at[rows, columns].set(True, mode="drop")
    is_negative = ~is_positive & (first + jnp.arange(count) < num_labels)
    negatives = jnp.where(is_negative, scores, -jnp.inf)
    highest = lax.pmax(negatives.max(axis=1, keepdims=True), axes)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.exp(negatives - highest)
    total = lax.psum(weights.sum(axis=1, keepdims=True), axes)
    of_positives = lax.psum(jnp.where(here, scores[rows, jnp.minimum(columns, count - 1)], 0), axes)
    margins = highest + jnp.log(total) - of_positives
    pairs = jnp.maximum(given.sum(), 1)
    loss = jnp.where(given, jax.nn.softplus(margins), 0).sum() / pairs
    # The derivative of the loss of each pair by n; that by s is its negative.
    slopes = jnp.where(given, jax.nn.sigmoid(margins), 0) / pairs
    by_score = slopes.sum(axis=1, keepdims=True) * weights / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
    by_score = by_score.at[rows, columns].add(-slopes, mode="drop")
    by_classifiers = jnp.concatenate([by_score.T @ inputs, by_score.sum(axis=0)[:, None]], axis=1)
    return by_classifiers, SCALE * lax.psum(by_score @ classifiers[:, :-1], axes), loss

  split, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(
    share, mesh=mesh, in_specs=(split, whole, whole), out_specs=(split, whole, whole), check_vma=False
  )(classifiers, SCALE * queries, positives)
