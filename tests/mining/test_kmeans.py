"""Balanced k-means against a plain recursion; its balance, determinism and independence of devices."""

import jax
import numpy as np
import pytest

from vixml_jax.mining import kmeans
from vixml_jax.mining.kmeans import balanced_kmeans, draw_pairs
from vixml_jax.sharding import make_mesh, padded_rows, to_global

# Tests share this shape and number of clusters where they can, and so one compiled program.
NUM_ROWS, DIM, NUM_CLUSTERS = 500, 8, 32


def _normalize(rows):
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def _random_rows(num_rows=NUM_ROWS, dim=DIM):
  return _normalize(np.random.default_rng(0).standard_normal((num_rows, dim)))


def _clustered_rows(num_rows, dim, num_centers, noise=0.5):
  """Unit rows around random centers."""
  generator = np.random.default_rng(0)
  centers = _normalize(generator.standard_normal((num_centers, dim)))
  owner = generator.permutation(np.arange(num_rows) % num_centers)
  noise = noise * generator.standard_normal((num_rows, dim)) / np.sqrt(dim)
  return _normalize(centers[owner] + noise)


def _reference_split(rows, members, generator):
  """The two-way balanced split of pyxclib, as published, of one cluster."""
  rows = rows[members]
  centers = rows[generator.choice(len(rows), 2, replace=False)]
  before, similarity = -1e6, -2.0
  while similarity - before >= 1e-4:
    products = rows @ centers.T
    halves = np.array_split(np.argsort(products[:, 1] - products[:, 0], kind="stable"), 2)
    centers = _normalize(np.stack([rows[half].mean(axis=0) for half in halves]))
    products = rows @ centers.T
    before = similarity
    similarity = sum(products[half, i].sum() for i, half in enumerate(halves)) / len(rows)
  return [members[half] for half in halves]


def _reference(rows, num_clusters, seed):
  generator = np.random.default_rng(seed)
  clusters = [np.arange(len(rows))]
  while len(clusters) < num_clusters:
    clusters = [half for members in clusters for half in _reference_split(rows, members, generator)]
  labels = np.empty(len(rows), np.int32)
  for cluster, members in enumerate(clusters):
    labels[members] = cluster
  return labels


def _objective(rows, clusters):
  """Mean similarity of rows to the normalized mean of their cluster."""
  sums = np.zeros((clusters.max() + 1, rows.shape[1]))
  np.add.at(sums, clusters, rows)
  return np.sum(rows * _normalize(sums)[clusters]) / len(rows)


@pytest.mark.parametrize(("num_rows", "num_clusters"), [(1, 1), (1000, 1), (3, 2), (7, 4), (64, 64), (127, 64)])
def test_sizes_differ_by_at_most_one_for_awkward_numbers_of_rows(num_rows, num_clusters):
  clusters = balanced_kmeans(_random_rows(num_rows, 5), num_clusters, seed=3)
  sizes = np.bincount(clusters, minlength=num_clusters)
  assert clusters.dtype == np.int32 and clusters.shape == (num_rows,)
  assert len(sizes) == num_clusters and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("group_rows", [16384, 128], ids=["one group", "upper levels in place"])
def test_objective_is_within_one_percent_of_the_published_recursion(group_rows, monkeypatch):
  monkeypatch.setattr(kmeans, "GROUP_ROWS", group_rows)
  for rows in (_clustered_rows(1500, 24, 40), _random_rows(1500, 24)):
    ours = np.mean([_objective(rows, balanced_kmeans(rows, 64, seed=seed)) for seed in range(3)])
    published = np.mean([_objective(rows, _reference(rows, 64, seed)) for seed in range(3)])
    assert ours > 0.99 * published


def test_one_split_is_the_published_one_from_the_same_two_rows():
  rows = _clustered_rows(401, DIM, 2, noise=1.5)

  class SameChoice:
    def choice(self, *_, **__):
      return draw_pairs(11, len(rows), 1)[0][0]

  expected = np.zeros(len(rows), np.int32)
  expected[_reference_split(rows, np.arange(len(rows)), SameChoice())[1]] = 1
  np.testing.assert_array_equal(balanced_kmeans(rows, 2, seed=11), expected)


def test_planted_clusters_are_recovered():
  # Centers on the corners of nested pairs, so that each balanced split has one right answer.
  generator = np.random.default_rng(0)
  owner = generator.permutation(np.arange(NUM_ROWS - NUM_ROWS % 8) % 8)
  bits = (owner[:, None] >> np.arange(3)) & 1
  corners = np.concatenate([np.eye(8)[owner], (2 * bits - 1) * [3, 1.5, 0.75]], axis=1)
  rows = _normalize(corners + 0.02 * generator.standard_normal(corners.shape))
  clusters = balanced_kmeans(rows, 8, seed=0)
  for cluster in range(8):
    assert len(set(owner[clusters == cluster])) == 1


def test_siblings_are_halves_of_one_parent():
  rows = _random_rows()
  np.testing.assert_array_equal(
    balanced_kmeans(rows, NUM_CLUSTERS, seed=1) // 4, balanced_kmeans(rows, NUM_CLUSTERS // 4, seed=1)
  )


def test_clusters_are_a_function_of_the_seed():
  rows = _random_rows()
  first = balanced_kmeans(rows, NUM_CLUSTERS, seed=5)
  np.testing.assert_array_equal(first, balanced_kmeans(rows, NUM_CLUSTERS, seed=5))
  assert np.any(first != balanced_kmeans(rows, NUM_CLUSTERS, seed=6))


@pytest.mark.parametrize(
  ("num_rows", "block_rows", "group_rows"),
  [
    pytest.param(900, 4096, 16384, id="one group"),
    pytest.param(2201, 64, 150, id="two groups a device, upper levels in place"),
  ],
)
def test_eight_devices_give_the_clusters_of_one(num_rows, block_rows, group_rows, monkeypatch):
  monkeypatch.setattr(kmeans, "BLOCK_ROWS", block_rows)
  monkeypatch.setattr(kmeans, "GROUP_ROWS", group_rows)
  rows = _clustered_rows(num_rows, DIM, 90)
  expected = balanced_kmeans(rows, 64, seed=2)
  mesh = make_mesh(data=2, fsdp=2, tensor=2)
  np.testing.assert_array_equal(balanced_kmeans(rows, 64, seed=2, mesh=mesh), expected)
  padded = np.pad(rows, ((0, padded_rows(num_rows) - num_rows), (0, 0)), constant_values=7)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
  sharded = to_global(padded, sharding)
  np.testing.assert_array_equal(balanced_kmeans(sharded, 64, seed=2, num_rows=num_rows), expected)


def test_rows_after_num_rows_are_ignored():
  rows = _random_rows()
  padded = np.concatenate([rows, 100 * np.ones((40, DIM), np.float32)])
  np.testing.assert_array_equal(
    balanced_kmeans(padded, NUM_CLUSTERS, seed=0, num_rows=NUM_ROWS), balanced_kmeans(rows, NUM_CLUSTERS, seed=0)
  )


@pytest.mark.parametrize("kept", [slice(None, None, 2), slice(0)], ids=["half of the rows", "all rows"])
def test_rows_of_zeros_are_divided_equally(kept):
  rows = np.zeros((NUM_ROWS, DIM), np.float32)
  rows[kept] = _random_rows()[kept]
  assert np.ptp(np.bincount(balanced_kmeans(rows, NUM_CLUSTERS, seed=0), minlength=NUM_CLUSTERS)) <= 1


@pytest.mark.parametrize("distinct", [1, 2, 7])
def test_rows_that_repeat_are_divided_equally_and_the_same_way_each_time(distinct):
  rows = _random_rows()[np.arange(NUM_ROWS) % distinct]
  clusters = balanced_kmeans(rows, NUM_CLUSTERS, seed=0)
  assert np.ptp(np.bincount(clusters, minlength=NUM_CLUSTERS)) <= 1
  np.testing.assert_array_equal(clusters, balanced_kmeans(rows, NUM_CLUSTERS, seed=0))
  if distinct == 2:  # No half of the first split has both.
    assert len({*zip(clusters // (NUM_CLUSTERS // 2), np.arange(NUM_ROWS) % 2, strict=True)}) == 2


def test_the_length_of_rows_does_not_matter():
  rows = _random_rows()
  lengths = 2.0 ** np.random.default_rng(1).integers(-3, 6, (NUM_ROWS, 1))
  np.testing.assert_array_equal(
    balanced_kmeans((rows * lengths).astype(np.float32), NUM_CLUSTERS, seed=4),
    balanced_kmeans(rows, NUM_CLUSTERS, seed=4),
  )


def test_bfloat16_rows_give_an_objective_like_float32():
  rows = _clustered_rows(NUM_ROWS, DIM, 20)
  clusters = balanced_kmeans(jax.numpy.asarray(rows, jax.numpy.bfloat16), NUM_CLUSTERS, seed=0)
  assert _objective(rows, clusters) > 0.98 * _objective(rows, balanced_kmeans(rows, NUM_CLUSTERS, seed=0))


@pytest.mark.parametrize(
  ("num_clusters", "message"),
  [(0, "power of two"), (12, "power of two"), (-4, "power of two"), (16, "16 clusters need as many rows, got 10")],
)
def test_impossible_numbers_of_clusters_are_refused(num_clusters, message):
  with pytest.raises(ValueError, match=message):
    balanced_kmeans(_random_rows(10, 4), num_clusters, seed=0)


def test_zero_iterations_are_refused():
  with pytest.raises(ValueError, match="iterations must be at least 1"):
    balanced_kmeans(_random_rows(10, 4), 2, seed=0, iterations=0)
