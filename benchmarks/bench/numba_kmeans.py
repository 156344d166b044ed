"""Balanced spherical 2-means, recursively, compiled by numba: clusters of a level run in parallel threads."""

import numba
import numpy as np

_TOLERANCE, _MOST_ITERATIONS = 1e-4, 50


@numba.njit(cache=True, fastmath=True)
def _halve(rows: np.ndarray, members: np.ndarray, seed: int) -> None:
  """Orders the members of a cluster, so that each half of them is a cluster of the next level."""
  np.random.seed(seed)
  count, dim = len(members), rows.shape[1]
  first = np.random.randint(count)
  second = (first + 1 + np.random.randint(count - 1)) % count
  difference = rows[members[second]] - rows[members[first]]
  centers = np.empty((2, dim), np.float32)
  scores = np.empty(count, np.float32)
  before = np.float32(-2.0)
  for _ in range(_MOST_ITERATIONS):
    for i in range(count):
      scores[i] = np.dot(rows[members[i]], difference)
    members[:] = members[np.argsort(scores)]
    centers[:] = 0
    for i in range(count):
      half = 0 if i < (count + 1) // 2 else 1
      centers[half] += rows[members[i]]
    # The norm of the sum of a half is the sum of its similarities to its normalized mean.
    similarity = np.float32(0.0)
    for half in range(2):
      norm = np.sqrt(np.dot(centers[half], centers[half]))
      similarity += norm / count
      centers[half] /= max(norm, np.float32(1e-12))
    if similarity - before < _TOLERANCE:
      break
    before = similarity
    difference = centers[1] - centers[0]


@numba.njit(cache=True, parallel=True)
def _halve_all(rows: np.ndarray, order: np.ndarray, bounds: np.ndarray, seed: int) -> None:
  for cluster in numba.prange(len(bounds) - 1):
    _halve(rows, order[bounds[cluster] : bounds[cluster + 1]], seed + cluster)


def balanced_kmeans(rows: np.ndarray, num_clusters: int, seed: int, num_threads: int) -> np.ndarray:
  """Returns the cluster of each row, int32 [N]; the sizes of clusters differ by at most one.

  Args:
    rows: float32 [N, D] of unit norm.
    num_clusters: Number of clusters, a power of two.
    seed: Seed of the first centers.
    num_threads: Number of threads.
  """
  numba.set_num_threads(min(num_threads, numba.config.NUMBA_NUM_THREADS))
  order, bounds = np.arange(len(rows)), np.asarray([0, len(rows)])
  while len(bounds) <= num_clusters:
    _halve_all(rows, order, bounds, seed)
    middles = (bounds[:-1] + bounds[1:] + 1) // 2
    bounds = np.concatenate([bounds[:1], np.stack([middles, bounds[1:]], axis=1).ravel()])
  labels = np.empty(len(rows), np.int32)
  labels[order] = np.repeat(np.arange(num_clusters, dtype=np.int32), np.diff(bounds))
  return labels
