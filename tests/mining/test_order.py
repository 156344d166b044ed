"""The order of an epoch and the schedule of cluster updates."""

import math

import numpy as np
import pytest

from vixml_jax.mining.order import cluster_size_at, epoch_order, is_cluster_update, num_query_clusters


@pytest.mark.parametrize("num_queries", [1, 15, 16, 17, 6000, 294_805, 2_248_619])
@pytest.mark.parametrize("cluster_size", [2, 16, 100, 1024])
def test_number_of_clusters_is_the_power_of_two_of_the_paper(num_queries, cluster_size):
  expected = 2 ** max(0, math.ceil(math.log2(num_queries / cluster_size)))
  assert num_query_clusters(num_queries, cluster_size) == expected


@pytest.mark.parametrize(("num_queries", "expected"), [(1, 1), (3, 2), (16, 16), (17, 16), (16_229, 8192)])
def test_no_cluster_is_empty_with_a_cluster_size_of_one(num_queries, expected):
  assert num_query_clusters(num_queries, 1) == expected


def test_impossible_sizes_are_refused():
  with pytest.raises(ValueError, match="at least 1"):
    num_query_clusters(10, 0)
  with pytest.raises(ValueError, match="at least 1"):
    is_cluster_update(3, start=1, every=0)


def test_updates_begin_at_the_end_of_the_start_epoch_and_recur():
  assert [e for e in range(30) if is_cluster_update(e, start=10, every=5)] == [10, 15, 20, 25]
  assert [e for e in range(9) if is_cluster_update(e, start=2, every=2)] == [2, 4, 6, 8]
  assert not any(is_cluster_update(e, start=100, every=5) for e in range(100))


def test_cluster_size_doubles_before_the_update_of_its_epoch():
  doubling = (20, 40, 60)
  assert [cluster_size_at(e, 16, doubling) for e in (0, 19, 20, 39, 40, 60, 149)] == [16, 16, 32, 32, 64, 128, 128]
  assert cluster_size_at(10, 16, ()) == 16


def test_without_clusters_every_query_is_read_once_in_random_order():
  order = epoch_order(0, 3, 1000)
  assert order.dtype == np.int64
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  assert np.mean(np.abs(np.diff(order)) == 1) < 0.02


def test_order_is_a_function_of_seed_and_epoch():
  clusters = np.random.default_rng(0).integers(0, 64, 1000)
  for given in (None, clusters):
    first = epoch_order(1, 2, 1000, given)
    epoch_order(1, 9, 1000, given)
    np.testing.assert_array_equal(first, epoch_order(1, 2, 1000, given))
    assert np.any(first != epoch_order(1, 3, 1000, given))
    assert np.any(first != epoch_order(2, 2, 1000, given))


def test_clusters_are_read_whole_in_random_order_with_ascending_members():
  clusters = np.random.default_rng(0).permutation(np.arange(1000) % 50)
  order = epoch_order(0, 0, 1000, clusters)
  np.testing.assert_array_equal(np.sort(order), np.arange(1000))
  read = clusters[order].reshape(50, 20)
  assert np.all(read == read[:, :1])
  assert np.all(np.diff(order.reshape(50, 20), axis=1) > 0)
  assert np.any(read[:, 0] != np.arange(50))


def test_clusters_of_another_length_are_refused():
  with pytest.raises(ValueError, match="do not fit 9 queries"):
    epoch_order(0, 0, 9, np.zeros(10, np.int32))
