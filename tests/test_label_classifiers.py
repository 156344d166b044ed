"""The decoupled softmax of queries against classifiers of all labels: its gradients, on any number of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.label_classifiers import SCALE, decoupled_softmax, prefix_softmax
from vixml_jax.mining.rows import shard_rows
from vixml_jax.ragged import Ragged, padded_ids

NUM_LABELS, DIM = 13, 5


def _mesh(count):
  return sharding.make_mesh(fsdp=2 if count > 1 else 1, devices=jax.devices()[:count])


def _unit(rows, seed):
  vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _loss(weights, queries, positives):
  """The mean of ln(1 + exp(n - s)) over pairs, written with loops over pairs."""
  losses = []
  for row, of_query in enumerate(positives):
    scores = SCALE * queries[row] @ weights[:, :-1].T + weights[:, -1]
    others = np.setdiff1d(np.arange(NUM_LABELS), of_query)
    negatives = jax.nn.logsumexp(scores[others]) if len(others) else -jnp.inf
    losses += [jnp.logaddexp(0, negatives - scores[label]) for label in of_query]
  return sum(losses) / len(losses)


def _value_and_gradients(weights, queries, positives, mesh):
  """The loss, and its gradients by classifiers and queries."""
  function = jax.value_and_grad(lambda *inputs: decoupled_softmax(*inputs, positives, NUM_LABELS, mesh), argnums=(0, 1))
  loss, gradients = jax.jit(function)(shard_rows(weights, mesh), jnp.asarray(queries))
  return loss, *map(np.asarray, gradients)


def test_the_loss_and_its_gradients_are_those_of_automatic_differentiation():
  rows = [[0], [3, 12, 7], [], [11]]
  queries, weights = _unit(len(rows), 0), np.random.default_rng(1).normal(size=(NUM_LABELS, DIM + 1)).astype(np.float32)
  positives = padded_ids(Ragged.from_rows(rows), len(rows), 4)
  expected = jax.jit(jax.value_and_grad(lambda *inputs: 2.5 * _loss(*inputs, rows), argnums=(0, 1)))
  loss, (by_classifiers, by_queries) = expected(weights, queries)
  for devices in (1, 8):
    mesh = _mesh(devices)
    value, *found = _value_and_gradients(weights, queries, positives, mesh)
    assert 2.5 * float(value) == pytest.approx(float(loss), rel=1e-5)
    np.testing.assert_allclose(2.5 * found[0][:NUM_LABELS], by_classifiers, atol=1e-5)
    np.testing.assert_array_equal(found[0][NUM_LABELS:], 0)
    np.testing.assert_allclose(2.5 * found[1], by_queries, atol=1e-5)


def test_a_query_whose_positives_are_all_labels_changes_nothing():
  weights = np.ones((NUM_LABELS, DIM + 1), np.float32)
  positives = np.arange(NUM_LABELS, dtype=np.int32)[None]
  loss, *gradients = _value_and_gradients(weights, _unit(1, 0), positives, _mesh(2))
  assert float(loss) == 0
  for gradient in gradients:
    np.testing.assert_array_equal(gradient, 0)


def test_prefixes_are_trained_as_vectors_of_their_own():
  rows = [[0], [3, 12], [11]]
  queries, weights = _unit(len(rows), 2), np.random.default_rng(3).normal(size=(NUM_LABELS, DIM + 1)).astype(np.float32)
  positives = padded_ids(Ragged.from_rows(rows), len(rows), 2)

  def expected(weights, queries):
    losses = []
    for dim in (DIM, 2):
      part = queries[:, :dim] / jnp.linalg.norm(queries[:, :dim], axis=1, keepdims=True)
      losses.append(_loss(jnp.concatenate([weights[:, :dim], weights[:, -1:]], axis=1), part, rows))
    return sum(losses) / len(losses)

  loss, (by_classifiers, by_queries) = jax.jit(jax.value_and_grad(expected, argnums=(0, 1)))(weights, queries)
  mesh = _mesh(8)

  def prefixes(*inputs):
    return prefix_softmax(*inputs, positives, NUM_LABELS, mesh, (DIM, 2))

  value, found = jax.jit(jax.value_and_grad(prefixes, argnums=(0, 1)))(shard_rows(weights, mesh), jnp.asarray(queries))
  assert float(value) == pytest.approx(float(loss), rel=1e-5)
  np.testing.assert_allclose(np.asarray(found[0])[:NUM_LABELS], by_classifiers, atol=1e-5)
  # At unit length, the loss of whole vectors does not normalize them again, so its gradient has a part along them.
  along = np.sum((np.asarray(found[1]) - by_queries) * queries, axis=1, keepdims=True) * queries
  np.testing.assert_allclose(np.asarray(found[1]) - along, by_queries, atol=1e-5)
