"""Balanced k-means against a plain recursion, its balance, determinism and independence of devices."""

import jax
import numpy as np
import pytest

from vixml_jax.mining import kmeans
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.sharding import make_mesh, to_global


def _normalize(rows):
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def _random_rows(num_rows, dim, seed=0):
  return _normalize(np.random.default_rng(seed).standard_normal((num_rows, dim)))


def _clustered_rows(num_rows, dim, num_centers, noise=0.5, seed=0):
  """Unit rows around random centers, and the center of each."""
  generator = np.random.default_rng(seed)
  centers = _normalize(generator.standard_normal((num_centers, dim)))
  owner = generator.permutation(np.arange(num_rows) % num_centers)
  noise = noise * generator.standard_normal((num_rows, dim)) / np.sqrt(dim)
  return _normalize(centers[owner] + noise), owner


def _reference_split(rows, members, generator):
  """pyxclib's two-way balanced split, as published, one cluster at a time."""
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


def _reference(rows, num_clusters, seed=0):
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


@pytest.mark.parametrize(
  "num_rows, num_clusters",
  [(1, 1), (2, 2), (3, 2), (7, 4), (64, 64), (65, 64), (127, 64), (1000, 1), (1001, 64), (1023, 128)],
)
def test_sizes_differ_by_at_most_one_for_awkward_numbers_of_rows(num_rows, num_clusters):
  clusters = balanced_kmeans(_random_rows(num_rows, 5), num_clusters, seed=3)
  sizes = np.bincount(clusters, minlength=num_clusters)
  assert clusters.dtype == np.int32 and clusters.shape == (num_rows,)
  assert len(sizes) == num_clusters and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("group_rows", [16384, 64])
@pytest.mark.parametrize(
  "rows",
  [pytest.param(_clustered_rows(2500, 24, 70)[0], id="clustered"), pytest.param(_random_rows(2500, 24), id="random")],
)
def test_objective_is_within_one_percent_of_the_published_recursion(rows, group_rows, monkeypatch):
  monkeypatch.setattr(kmeans, "GROUP_ROWS", group_rows)
  seeds = range(3)
  ours = np.mean([_objective(rows, balanced_kmeans(rows, 128, seed=seed)) for seed in seeds])
  published = np.mean([_objective(rows, _reference(rows, 128, seed)) for seed in seeds])
  assert ours > 0.99 * published


def test_one_split_is_the_published_one_from_the_same_two_rows():
  rows = _clustered_rows(401, 12, 2, noise=1.5)[0]

  class SameChoice:
    """Draws what ours draws at its first level."""

    def choice(self, *unused_args, **unused_kwargs):
      return kmeans._draw_pairs(11, len(rows), 1)[0][0]

  expected = np.zeros(len(rows), np.int32)
  expected[_reference_split(rows, np.arange(len(rows)), SameChoice())[1]] = 1
  np.testing.assert_array_equal(balanced_kmeans(rows, 2, seed=11), expected)


def test_planted_clusters_are_recovered():
  # Centers on the corners of nested pairs, so that each balanced split has one right answer.
  generator = np.random.default_rng(0)
  owner = generator.permutation(np.arange(800) % 8)
  bits = (owner[:, None] >> np.arange(3)) & 1
  corners = np.concatenate([np.eye(8)[owner], (2 * bits - 1) * [3, 1.5, 0.75]], axis=1)
  rows = _normalize(corners + 0.02 * generator.standard_normal(corners.shape))
  clusters = balanced_kmeans(rows, 8, seed=0)
  for cluster in range(8):
    assert len(set(owner[clusters == cluster])) == 1


def test_siblings_are_halves_of_one_parent():
  rows = _clustered_rows(500, 8, 10)[0]
  np.testing.assert_array_equal(balanced_kmeans(rows, 32, seed=1) // 4, balanced_kmeans(rows, 8, seed=1))


def test_same_seed_same_clusters_other_seed_other_clusters():
  rows = _random_rows(600, 8)
  first = balanced_kmeans(rows, 16, seed=5)
  np.testing.assert_array_equal(first, balanced_kmeans(rows, 16, seed=5))
  assert np.any(first != balanced_kmeans(rows, 16, seed=6))


@pytest.mark.parametrize("group_rows, num_rows", [(16384, 900), (300, 9001)])
@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_give_the_clusters_of_one(group_rows, num_rows, shape, monkeypatch):
  monkeypatch.setattr(kmeans, "GROUP_ROWS", group_rows)
  rows = _clustered_rows(num_rows, 16, 90)[0]
  expected = balanced_kmeans(rows, 256, seed=2)
  mesh = make_mesh(**shape)
  np.testing.assert_array_equal(balanced_kmeans(rows, 256, seed=2, mesh=mesh), expected)
  padded = np.pad(rows, ((0, -num_rows % 8), (0, 0)), constant_values=7)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
  sharded = to_global(padded, sharding)
  np.testing.assert_array_equal(balanced_kmeans(sharded, 256, seed=2, num_rows=num_rows), expected)


def test_rows_beyond_num_rows_do_not_count():
  rows = _random_rows(300, 8)
  padded = np.concatenate([rows, 100 * np.ones((40, 8), np.float32)])
  np.testing.assert_array_equal(balanced_kmeans(padded, 16, seed=0, num_rows=300), balanced_kmeans(rows, 16, seed=0))


def test_rows_never_seen_are_shared_out_and_do_not_move_the_others_centers():
  rows = _clustered_rows(600, 16, 4, noise=0.1)[0]
  rows[::3] = 0
  clusters = balanced_kmeans(rows, 32, seed=0)
  assert np.ptp(np.bincount(clusters, minlength=32)) <= 1
  assert balanced_kmeans(np.zeros((50, 4), np.float32), 8, seed=0).max() == 7


def test_the_length_of_rows_does_not_matter():
  rows = _random_rows(500, 8)
  lengths = 2.0 ** np.random.default_rng(1).integers(-3, 6, (500, 1))
  np.testing.assert_array_equal(balanced_kmeans(rows * lengths, 32, seed=4), balanced_kmeans(rows, 32, seed=4))


def test_bfloat16_rows_cluster_about_as_well():
  rows = _clustered_rows(1000, 16, 40)[0]
  clusters = balanced_kmeans(jax.numpy.asarray(rows, jax.numpy.bfloat16), 64, seed=0)
  assert _objective(rows, clusters) > 0.98 * _objective(rows, balanced_kmeans(rows, 64, seed=0))


@pytest.mark.parametrize(
  "num_clusters, message",
  [(0, "power of two"), (12, "power of two"), (-4, "power of two"), (16, "16 clusters need as many rows, got 10")],
)
def test_impossible_numbers_of_clusters_are_refused(num_clusters, message):
  with pytest.raises(ValueError, match=message):
    balanced_kmeans(_random_rows(10, 4), num_clusters, seed=0)


def test_no_iterations_are_refused():
  with pytest.raises(ValueError, match="iterations must be at least 1"):
    balanced_kmeans(_random_rows(10, 4), 2, seed=0, iterations=0)
