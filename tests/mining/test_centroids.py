"""Label centroids equal sparse matrix products, on one and on eight devices."""

import jax
import numpy as np
import pytest
import scipy.sparse

from tests.helpers.sharded import from_host
from vixml_jax.mining import centroids
from vixml_jax.mining.centroids import cluster_means, label_centroids, mean_of_rows
from vixml_jax.ragged import Ragged
from vixml_jax.sharding import make_mesh, named_sharding, padded_rows


def _problem(num_queries=500, num_labels=96, dim=12, seed=0):
  """Embeddings and lists of labels with a long tail; some queries and labels have no pair."""
  generator = np.random.default_rng(seed)
  embeddings = generator.standard_normal((num_queries, dim)).astype(np.float32)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  propensity = 1 / np.arange(1, num_labels + 1)
  propensity[5] = 0
  rows = [
    generator.choice(num_labels, generator.integers(0, 7), replace=False, p=propensity / propensity.sum())
    for _ in range(num_queries)
  ]
  return embeddings, Ragged.from_rows(rows)


def _expected(embeddings, labels_of_queries, num_labels):
  matrix = scipy.sparse.csr_matrix(
    (np.ones(len(labels_of_queries.values)), labels_of_queries.values, labels_of_queries.offsets),
    shape=(len(labels_of_queries), num_labels),
  )
  counts = np.asarray(matrix.sum(axis=0)).reshape(-1, 1)
  return matrix.T @ embeddings.astype(np.float64) / np.maximum(counts, 1)


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks so small that the labels, and the pairs of one label, take several."""
  monkeypatch.setattr(centroids, "PAIR_BLOCK", 32)
  monkeypatch.setattr(centroids, "LABEL_BLOCK", 40)


def test_centroids_are_the_means_of_the_queries_of_each_label():
  embeddings, labels = _problem()
  result = label_centroids(embeddings, labels, 96)
  expected = _expected(embeddings, labels, 96)
  assert result.shape == (padded_rows(96), 12) and result.dtype == np.float32
  np.testing.assert_allclose(result[:96], expected, atol=3e-7)
  assert not np.any(expected[5]) and not np.any(np.asarray(result)[5])
  assert not np.any(np.asarray(result)[96:]), "padding"


@pytest.mark.parametrize("num_labels", [96, 97])
def test_small_blocks_of_pairs_and_labels_give_the_same_means(small_blocks, num_labels):
  embeddings, labels = _problem()
  np.testing.assert_allclose(
    label_centroids(embeddings, labels, num_labels)[:num_labels], _expected(embeddings, labels, num_labels), atol=3e-7
  )


@pytest.mark.parametrize("num_labels", [96, 101])
def test_eight_devices_give_the_bits_of_one(small_blocks, num_labels):
  embeddings, labels = _problem(num_queries=504)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  result = label_centroids(from_host(embeddings, mesh).values, labels, num_labels)
  np.testing.assert_array_equal(result, label_centroids(embeddings, labels, num_labels))
  assert result.sharding.is_equivalent_to(named_sharding(mesh, "label", "vector"), 2)


def test_cluster_means_have_a_row_for_each_cluster_and_normalize_if_asked_to():
  embeddings, _ = _problem()
  clusters = np.random.default_rng(1).integers(0, 7, 500)  # No row is in the last of 8 clusters.
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  lengths = np.random.default_rng(2).uniform(0.1, 9, (500, 1)).astype(np.float32)
  long = from_host(embeddings * lengths, mesh).values
  result = cluster_means(long, clusters, 8, normalized=True)
  expected = np.stack([embeddings[clusters == cluster].mean(0) for cluster in range(7)] + [np.zeros(12)])
  np.testing.assert_allclose(result, expected, atol=3e-7)
  assert result.sharding.is_equivalent_to(named_sharding(mesh, "free_vector", "vector"), 2)
  plain = np.stack([(embeddings * lengths)[clusters == cluster].mean(0) for cluster in range(7)] + [np.zeros(12)])
  np.testing.assert_allclose(cluster_means(long, clusters, 8), plain, atol=3e-6)


def test_means_of_rows_are_the_centroids_of_the_transposed_pairs(small_blocks):
  embeddings, labels = _problem()
  np.testing.assert_array_equal(mean_of_rows(embeddings, labels.transpose(96)), label_centroids(embeddings, labels, 96))


def test_a_label_of_all_queries_with_large_embeddings_does_not_overflow():
  embeddings = np.full((5000, 3), [1000.0, -0.25, 3e-4], np.float32)
  labels = Ragged.from_rows([[0]] * 5000)
  np.testing.assert_allclose(label_centroids(embeddings, labels, 1)[0], embeddings[0], rtol=1e-3, atol=0.01)


def test_a_label_of_one_query_has_exactly_its_embedding():
  embeddings, _ = _problem(num_queries=8)
  labels = Ragged.from_rows([[7 - query] for query in range(8)])
  np.testing.assert_allclose(label_centroids(embeddings, labels, 8)[:8], embeddings[::-1], rtol=0, atol=2e-9)


def test_bfloat16_is_accepted_and_returned_and_rows_after_the_queries_are_ignored():
  embeddings, labels = _problem()
  stored = jax.numpy.asarray(np.pad(embeddings, ((0, 12), (0, 0))), jax.numpy.bfloat16)
  result = label_centroids(stored, labels, 96, dtype=jax.numpy.bfloat16)
  assert result.dtype == jax.numpy.bfloat16
  expected = _expected(np.asarray(stored, np.float32)[:500], labels, 96)
  np.testing.assert_allclose(np.asarray(result, np.float32)[:96], expected, rtol=0.005, atol=1e-4)


def test_without_pairs_centroids_are_zeros():
  empty = Ragged(np.zeros(0, np.int32), np.zeros(6, np.int64))
  result = label_centroids(np.ones((5, 4), np.float32), empty, 3)
  np.testing.assert_array_equal(result, np.zeros((padded_rows(3), 4)))
