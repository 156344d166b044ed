"""The order in which an epoch reads the queries, a pure function of seed, epoch and clusters."""

from collections.abc import Collection

import numpy as np


def num_query_clusters(num_queries: int, cluster_size: int) -> int:
  """Returns the number of clusters, `2 ** ceil(log2(num_queries / cluster_size))`, at least 1.

  It is a power of two, so the actual cluster sizes are between half of `cluster_size` and `cluster_size`. A cluster has
  at least one query, so with a `cluster_size` of 1 the sizes are 1 and 2.

  >>> num_query_clusters(1000, 16)
  64
  >>> num_query_clusters(1000, 1)
  512

  Raises:
    ValueError: An argument is below 1.
  """
  if num_queries < 1 or cluster_size < 1:
    raise ValueError(f"num_queries {num_queries} and cluster_size {cluster_size} must be at least 1")
  at_least = -(-num_queries // cluster_size)
  clusters = 1 << (at_least - 1).bit_length()
  return clusters if clusters <= num_queries else clusters // 2


def is_cluster_update(epoch: int, start: int, every: int) -> bool:
  """Returns whether clusters are computed again at the END of `epoch` (counted from 0).

  The first clusters are computed at the end of epoch `start` and order epoch `start + 1`. Epochs 0 to `start` read the
  queries in random order.

  Args:
    epoch: Epoch that has just ended.
    start: First epoch that ends with an update.
    every: Number of epochs from one update to the next.

  Raises:
    ValueError: `every` is below 1.
  """
  if every < 1:
    raise ValueError(f"epochs between cluster updates must be at least 1, got {every}")
  return epoch >= start and (epoch - start) % every == 0


def cluster_size_at(epoch: int, base: int, doubling_epochs: Collection[int]) -> int:
  """Returns the cluster size at the end of `epoch`: `base`, doubled once for each doubling epoch up to and with it.

  The size doubles at the end of a doubling epoch, before the update of that epoch if there is one. It has an effect
  from the next update on; existing clusters do not change.

  >>> [cluster_size_at(epoch, 16, (2, 4)) for epoch in range(6)]
  [16, 16, 32, 32, 64, 64]
  """
  return base << sum(doubling <= epoch for doubling in doubling_epochs)


def epoch_order(seed: int, epoch: int, num_queries: int, clusters: np.ndarray | None = None) -> np.ndarray:
  """Returns the queries in the order in which `epoch` reads them (NGAME, arXiv 2207.04452, algorithm 1).

  Args:
    seed: Seed of the run.
    epoch: Epoch, counted from 0.
    num_queries: Number of training queries N.
    clusters: int [N], the cluster of each query; None for an order without clusters.

  Returns:
    int64 [N], a permutation of the queries. Without clusters, it is random. With clusters, clusters are in random order
    and the members of each are consecutive, in ascending order.

  Raises:
    ValueError: `clusters` does not have N entries.
  """
  generator = np.random.Generator(np.random.PCG64([seed, epoch]))
  if clusters is None:
    return generator.permutation(num_queries)
  if clusters.shape != (num_queries,):
    raise ValueError(f"clusters of shape {clusters.shape} do not fit {num_queries} queries")
  num_clusters = int(clusters.max(initial=-1)) + 1
  place = generator.permutation(num_clusters)
  return np.argsort(place[clusters], kind="stable")
