"""Compares the speed of mining (balanced k-means, label centroids) with CPU code written like pyxclib, in one run.

  .venv/bin/python -m benchmarks.mining                                # 100,000 x 384 into clusters of 16
  .venv/bin/python -m benchmarks.mining --rows=200000 --no-reference   # ours alone, on more rows

The script prints wall-clock seconds and CPU seconds; the latter are comparable on a busy machine as well.
"""

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os
import resource
import time
from typing import Any

import jax
import numpy as np
import scipy.sparse

from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import epoch_order, num_query_clusters
from vixml_jax.ragged import Ragged


def _normalize(rows: np.ndarray) -> np.ndarray:
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _embeddings(num_rows: int, dim: int, generator: np.random.Generator) -> np.ndarray:
  """Returns float32 rows of unit norm around num_rows / 40 centers."""
  centers = generator.standard_normal((num_rows // 40 + 1, dim), dtype=np.float32)
  rows = generator.standard_normal((num_rows, dim), dtype=np.float32)
  rows *= 0.7
  rows += centers[generator.integers(len(centers), size=num_rows)]
  return _normalize(rows)


def _labels(num_queries: int, num_labels: int, generator: np.random.Generator) -> Ragged:
  """Returns 8 labels for each query; the frequencies have a long tail."""
  values = (num_labels * generator.random(8 * num_queries) ** 3).astype(np.int32)
  return Ragged(values, np.arange(num_queries + 1, dtype=np.int64) * 8)


def _split(rows: np.ndarray, members: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
  """Splits the members into two halves by balanced spherical 2-means, as in pyxclib."""
  rows = rows[members]
  centers = rows[generator.choice(len(rows), 2, replace=False)]
  products = rows @ centers.T
  before, similarity = -1e6, -2.0
  while similarity - before >= 1e-4:
    halves = np.array_split(np.argsort(products[:, 1] - products[:, 0]), 2)
    centers = _normalize(np.stack([rows[half].mean(axis=0) for half in halves]))
    products = rows @ centers.T
    before = similarity
    similarity = sum(products[half, i].sum() for i, half in enumerate(halves)) / len(rows)
  return [members[half] for half in halves]


def reference_kmeans(rows: np.ndarray, num_clusters: int, num_threads: int) -> np.ndarray:
  """Returns clusters made one at a time; threads share the clusters of a level."""
  clusters = [np.arange(len(rows))]
  with ThreadPoolExecutor(num_threads) as pool:
    while len(clusters) < num_clusters:
      generators = np.random.default_rng(len(clusters)).spawn(len(clusters))
      pairs = pool.map(_split, [rows] * len(clusters), clusters, generators)
      clusters = [half for pair in pairs for half in pair]
  labels = np.empty(len(rows), np.int32)
  for cluster, members in enumerate(clusters):
    labels[members] = cluster
  return labels


def _by_label(labels: Ragged, num_labels: int) -> scipy.sparse.csr_matrix:
  """Returns the sparse matrix [L, N] of the pairs."""
  ones = np.ones(len(labels.values), np.float32)
  return scipy.sparse.csr_matrix((ones, labels.values, labels.offsets), (len(labels), num_labels)).T.tocsr()


def reference_centroids(rows: np.ndarray, labels: Ragged, num_labels: int) -> np.ndarray:
  """Returns label centroids [L, D] by a sparse matrix product."""
  matrix = _by_label(labels, num_labels)
  return (matrix @ rows) / np.maximum(np.diff(matrix.indptr), 1)[:, None].astype(np.float32)


def objective(rows: np.ndarray, clusters: np.ndarray) -> float:
  """Returns the mean similarity of rows to the normalized mean of their cluster."""
  members = Ragged(clusters, np.arange(len(clusters) + 1, dtype=np.int64))
  sums = _by_label(members, clusters.max() + 1) @ rows
  return float(np.sum(np.linalg.norm(sums, axis=1)) / len(rows))


def _timed(name: str, function: Callable[[], Any]) -> tuple[Any, float]:
  """Calls the function and prints its times; returns its result and the seconds."""
  start, cpu_start = time.perf_counter(), time.process_time()
  result = jax.block_until_ready(function())
  seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
  print(f"{name:46s} {seconds:8.2f} s, CPU time {cpu_seconds:8.2f} s", flush=True)
  return result, seconds


def main() -> None:
  """Runs both on the same synthetic embeddings and prints their times and objectives."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rows", type=int, default=100_000)
  parser.add_argument("--dim", type=int, default=384)
  parser.add_argument("--labels", type=int, default=50_000)
  parser.add_argument("--cluster-size", type=int, default=16)
  parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of the reference")
  parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
  flags = parser.parse_args()
  generator = np.random.default_rng(0)
  rows = _embeddings(flags.rows, flags.dim, generator)
  labels = _labels(flags.rows, flags.labels, generator)
  count = num_query_clusters(flags.rows, flags.cluster_size)
  print(f"{flags.rows} x {flags.dim}, {count} clusters, {flags.labels} labels, {jax.devices()[0].device_kind}")
  on_device = jax.device_put(rows)
  _timed("k-means, ours, first call (compiles)", lambda: balanced_kmeans(on_device, count, seed=0))
  ours, our_seconds = _timed("k-means, ours", lambda: balanced_kmeans(on_device, count, seed=1))
  _timed("label centroids, ours, first call (compiles)", lambda: label_centroids(on_device, labels, flags.labels))
  centroids, our_centroid_seconds = _timed(
    "label centroids, ours", lambda: label_centroids(on_device, labels, flags.labels)
  )
  _timed("order of an epoch", lambda: epoch_order(0, 0, flags.rows, ours))
  if flags.reference:
    published, seconds = _timed(
      f"k-means as in pyxclib, {flags.threads} threads", lambda: reference_kmeans(rows, count, flags.threads)
    )
    expected, centroid_seconds = _timed(
      "label centroids, scipy.sparse", lambda: reference_centroids(rows, labels, flags.labels)
    )
    print(
      f"k-means: {seconds / our_seconds:.2f} times as fast, objective {objective(rows, ours):.4f} "
      f"against {objective(rows, published):.4f}"
    )
    print(
      f"label centroids: {centroid_seconds / our_centroid_seconds:.2f} times as fast, "
      f"largest difference {np.max(np.abs(centroids - expected)):.1e}"
    )
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"peak resident memory {peak:.2f} GiB, of which embeddings twice {2 * rows.nbytes / 2**30:.2f} GiB")


if __name__ == "__main__":
  main()
