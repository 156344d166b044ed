"""The order in which queries are read, a pure function of (seed, epoch, clusters)."""

from collections.abc import Collection

import numpy as np


def num_query_clusters(num_queries: int, cluster_size: int) -> int:
  """Number of clusters, `2 ** ceil(log2(num_queries / cluster_size))`, at least 1.

  A power of two, so true cluster sizes lie between half and all of `cluster_size`.

  Raises:
    ValueError: when either argument is below 1.
  """
  if num_queries < 1 or cluster_size < 1:
    raise ValueError(f"num_queries {num_queries} and cluster_size {cluster_size} must be at least 1")
  at_least = -(-num_queries // cluster_size)
  return 1 << (at_least - 1).bit_length()


def is_cluster_update(epoch: int, start: int, every: int) -> bool:
  """Whether the clusters are made anew at the END of `epoch` (counted from 0).

  So the first clusters, made at the end of epoch `start`, order epoch `start + 1`; epochs
  0 to `start` are read at random.

  Args:
    epoch: the epoch that has just ended.
    start: first epoch that ends with an update.
    every: epochs from one update to the next.

  Raises:
    ValueError: when `every` is below 1.
  """
  if every < 1:
    raise ValueError(f"epochs between cluster updates must be at least 1, got {every}")
  return epoch >= start and (epoch - start) % every == 0


def cluster_size_at(epoch: int, base: int, doubling_epochs: Collection[int]) -> int:
  """Cluster size in force at the end of `epoch`: `base`, doubled once for each doubling epoch <= it.

  The size doubles at the end of a doubling epoch and before that epoch's update, if it has one.
  Otherwise it takes effect at the next update: clusters that exist are not touched.
  """
  return base << sum(doubling <= epoch for doubling in doubling_epochs)


def epoch_order(seed: int, epoch: int, num_queries: int, clusters: np.ndarray | None = None) -> np.ndarray:
  """Queries in the order in which `epoch` reads them (NGAME, arXiv 2207.04452, algorithm 1).

  Args:
    seed: of the run.
    epoch: counted from 0.
    num_queries: N.
    clusters: int [N], the cluster of every query; None for an order without clusters.

  Returns:
    int64 [N], a permutation of the queries. Without clusters it is random. With clusters, whole
    clusters come in random order and the members of one in ascending order.

  Raises:
    ValueError: when `clusters` has another length than N.
  """
  generator = np.random.Generator(np.random.PCG64([seed, epoch]))
  if clusters is None:
    return generator.permutation(num_queries)
  if clusters.shape != (num_queries,):
    raise ValueError(f"clusters of shape {clusters.shape} do not fit {num_queries} queries")
  num_clusters = int(clusters.max(initial=-1)) + 1
  place = generator.permutation(num_clusters)
  return np.argsort(place[clusters], kind="stable")
