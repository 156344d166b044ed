"""Batches of training queries in which similar queries are together, for training loops of any library."""

from collections.abc import Iterator

import jax
import numpy as np

from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import epoch_order, num_query_clusters


class HardNegativeSampler:
  """Yields the batches of one epoch after the other, as lists of row numbers.

  Before the first `update`, batches are random. Afterwards, the queries of a cluster are in one batch, so that the
  positives of one query are hard negatives for the others (NGAME, arXiv 2207.04452). It can be the `batch_sampler` of
  a `torch.utils.data.DataLoader`.

  Example:
    >>> sampler = HardNegativeSampler(num_queries=8, batch_size=4, cluster_size=4)
    >>> embeddings = np.eye(2, dtype=np.float32)[[0, 1, 0, 1, 0, 1, 0, 1]]  # Even rows are equal, and so are odd ones.
    >>> sampler.update(embeddings)
    >>> sorted(sorted(batch) for batch in sampler)
    [[0, 2, 4, 6], [1, 3, 5, 7]]

  Args:
    num_queries: Number of training queries N.
    batch_size: Number of queries in a batch; the last batch of an epoch may be smaller.
    cluster_size: Largest number of queries in a cluster. More means easier batches; the papers double it from 16
      on while they train.
    seed: Seed of the order of queries and clusters, and of the clusters.

  Raises:
    ValueError: A number is below 1.
  """

  def __init__(self, num_queries: int, batch_size: int, cluster_size: int = 16, seed: int = 0):
    if min(num_queries, batch_size, cluster_size) < 1:
      raise ValueError(
        f"num_queries={num_queries}, batch_size={batch_size} and cluster_size={cluster_size} must be at least 1"
      )
    self.num_queries, self.batch_size, self.cluster_size, self.seed = num_queries, batch_size, cluster_size, seed
    self._clusters: np.ndarray | None = None
    self._epoch = 0

  def __len__(self) -> int:
    """Number of batches in an epoch."""
    return -(-self.num_queries // self.batch_size)

  def __iter__(self) -> Iterator[list[int]]:
    """Yields the batches of the next epoch, each query in one of them."""
    order = epoch_order(self.seed, self._epoch, self.num_queries, self._clusters)
    self._epoch += 1
    for start in range(0, self.num_queries, self.batch_size):
      yield order[start : start + self.batch_size].tolist()

  def set_epoch(self, epoch: int) -> None:
    """Sets the number of the next epoch, from 0. A run that is continued calls it; the others count by themselves."""
    self._epoch = epoch

  def update(self, embeddings: np.ndarray | jax.Array) -> None:
    """Clusters the queries anew. Call it every few epochs, with embeddings by the current model.

    Args:
      embeddings: Embeddings of all queries of any float type, [N, D]; rows of zeros for queries without.

    Raises:
      ValueError: The number of rows is not N.
    """
    if len(embeddings) != self.num_queries:
      raise ValueError(f"embeddings have {len(embeddings)} rows, but there are {self.num_queries} queries")
    self._clusters = query_clusters(embeddings, self.num_queries, self.cluster_size, self.seed + self._epoch)


def query_clusters(embeddings: np.ndarray | jax.Array, num_queries: int, cluster_size: int, seed: int) -> np.ndarray:
  """Returns the cluster of each query, int32 [N], such that no cluster has more than `cluster_size` queries (2 for 1).

  Args:
    embeddings: Embeddings of the queries, [N or more, D]; rows after the first N are padding.
    num_queries: N.
    cluster_size: Largest number of queries in a cluster.
    seed: Seed of the first centers.
  """
  num_clusters = num_query_clusters(num_queries, cluster_size)
  return balanced_kmeans(embeddings, num_clusters, seed=seed, num_rows=num_queries)
