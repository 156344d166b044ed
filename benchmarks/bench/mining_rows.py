"""Rows of mining and packing: balanced k-means, label centroids, items into rows."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import os
from typing import Any

import jax
import numpy as np
import scipy.sparse

from benchmarks.bench.data import random_tokens, unit_vectors
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, Work
from vixml_jax.input.items import Items
from vixml_jax.input.packing import PackedLayout, pack
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import num_query_clusters
from vixml_jax.ragged import Ragged

_LEAST_OBJECTIVE = 0.99
_LARGEST_DIFFERENCE = 1e-4
_ROWS_PER_CENTER = 40
_NOISE = 0.7
_CLUSTER_SIZE = 16
_LABELS_OF_A_QUERY = 8
_TOLERANCE, _MIN_NORM = 1e-4, 1e-12
_VOCABULARY = 30_000


def kmeans(size: str) -> Work:
  """Balanced k-means of training queries into clusters of 16."""
  rows, dim = {"tiny": (256, 8), "cpu": (65_536, 384), "gpu": (131_072, 768)}[size]
  vectors = unit_vectors(rows, dim, rows // _ROWS_PER_CENTER + 1, seed=1, noise=_NOISE)
  count, threads = num_query_clusters(rows, _CLUSTER_SIZE), len(os.sched_getaffinity(0))

  def check(ours: np.ndarray, theirs: np.ndarray) -> Check:
    values = [_objective(vectors, clusters) for clusters in (ours, theirs)]
    return Check(values[1] >= _LEAST_OBJECTIVE * values[0], f"mean cosine {values[1]:.4f}, ours {values[0]:.4f}")

  def ours() -> Started:
    on_device = jax.device_put(vectors)
    return Started(lambda number: balanced_kmeans(on_device, count, seed=number))

  def numba() -> Started:
    from benchmarks.bench.numba_kmeans import balanced_kmeans as compiled

    return Started(lambda number: compiled(vectors, count, number, threads))

  return Work(
    what=f"{rows:,} vectors of {dim} dimensions into {count:,} clusters; the mean cosine to centers is compared",
    unit="vectors",
    units=rows,
    sides=[
      Side(OURS, ours),
      Side("numba, on the CPU", numba, ("numba",)),
      Side("numpy as in pyxclib, on the CPU", lambda: Started(lambda number: _kmeans(vectors, count, number, threads))),
    ],
    check=check,
  )


def _kmeans(rows: np.ndarray, num_clusters: int, seed: int, num_threads: int) -> np.ndarray:
  """Returns clusters made one at a time; threads share the clusters of a level."""
  clusters = [np.arange(len(rows))]
  with ThreadPoolExecutor(num_threads) as pool:
    while len(clusters) < num_clusters:
      generators = np.random.default_rng((seed, len(clusters))).spawn(len(clusters))
      pairs = pool.map(_split, [rows] * len(clusters), clusters, generators)
      clusters = [half for pair in pairs for half in pair]
  labels = np.empty(len(rows), np.int32)
  for cluster, members in enumerate(clusters):
    labels[members] = cluster
  return labels


def _split(rows: np.ndarray, members: np.ndarray, generator: np.random.Generator) -> list[np.ndarray]:
  """Splits the members into two halves by balanced spherical 2-means, as in pyxclib."""
  rows = rows[members]
  centers = rows[generator.choice(len(rows), 2, replace=False)]
  products = rows @ centers.T
  before, similarity = -1e6, -2.0
  while similarity - before >= _TOLERANCE:
    halves = np.array_split(np.argsort(products[:, 1] - products[:, 0]), 2)
    centers = np.stack([rows[half].mean(axis=0) for half in halves])
    centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), _MIN_NORM)
    products = rows @ centers.T
    before = similarity
    similarity = sum(products[half, i].sum() for i, half in enumerate(halves)) / len(rows)
  return [members[half] for half in halves]


def _objective(rows: np.ndarray, clusters: np.ndarray) -> float:
  """Returns the mean similarity of rows to the normalized mean of their cluster."""
  members = Ragged(clusters.astype(np.int32), np.arange(len(clusters) + 1, dtype=np.int64))
  sums = _by_label(members, clusters.max() + 1) @ rows
  return float(np.sum(np.linalg.norm(sums, axis=1)) / len(rows))


def _by_label(labels: Ragged, num_labels: int) -> scipy.sparse.csr_matrix:
  """Returns the sparse matrix [L, N] of the pairs."""
  ones = np.ones(len(labels.values), np.float32)
  return scipy.sparse.csr_matrix((ones, labels.values, labels.offsets), (len(labels), num_labels)).T.tocsr()


def centroids(size: str) -> Work:
  """Label centroids: the mean vector of the training queries of each label."""
  rows, dim, labels = {"tiny": (256, 8, 64), "cpu": (100_000, 384, 50_000), "gpu": (262_144, 768, 131_072)}[size]
  vectors = unit_vectors(rows, dim, rows // _ROWS_PER_CENTER + 1, seed=1, noise=_NOISE)
  # The frequencies of labels have a long tail.
  drawn = (labels * np.random.default_rng(0).random(_LABELS_OF_A_QUERY * rows) ** 3).astype(np.int32)
  pairs = Ragged(drawn, np.arange(rows + 1, dtype=np.int64) * _LABELS_OF_A_QUERY)

  def check(ours: Any, theirs: np.ndarray) -> Check:
    difference = float(np.abs(np.asarray(ours)[:labels] - theirs).max())
    return Check(difference <= _LARGEST_DIFFERENCE, f"largest difference {difference:.1e}")

  def ours() -> Started:
    on_device = jax.device_put(vectors)
    return Started(lambda _: jax.block_until_ready(label_centroids(on_device, pairs, labels)))

  def with_scipy(_: int) -> np.ndarray:
    matrix = _by_label(pairs, labels)
    return (matrix @ vectors) / np.maximum(np.diff(matrix.indptr), 1)[:, None].astype(np.float32)

  return Work(
    what=f"{labels:,} labels, {len(drawn):,} pairs with {rows:,} vectors of {dim} dimensions",
    unit="pairs",
    units=len(drawn),
    sides=[Side(OURS, ours), Side("scipy.sparse, on the CPU", lambda: Started(with_scipy))],
    check=check,
    # A vector is read for each pair, and every centroid is written.
    cost=Cost("bytes", 4.0 * dim * (len(drawn) + labels)),
  )


def packing(size: str) -> Work:
  """Items into rows without padding tokens, on the host, by one thread."""
  count = {"tiny": 64, "cpu": 65_536, "gpu": 65_536}[size]
  items, layout = Items.of_texts(random_tokens(count, _VOCABULARY, seed=1)), PackedLayout(128, 1)
  rows = [{"input_ids": row.tolist()} for row in np.split(items.tokens.values, items.tokens.offsets[1:-1])]

  def check(ours: tuple[int, int], theirs: tuple[int, int]) -> Check:
    padding = 1 - theirs[0] / theirs[1]
    return Check(
      ours[0] == theirs[0], f"{theirs[0]:,} tokens, padding {padding:.1%} (ours {1 - ours[0] / ours[1]:.1%})"
    )

  def ours(_: int) -> tuple[int, int]:
    packed = pack(items, layout, round_up=False)
    return packed.num_tokens, packed.tokens.size

  return Work(
    what=f"{count:,} items of {items.tokens.lengths.mean():.1f} tokens on average",
    unit="items",
    units=count,
    sides=[
      Side(OURS, lambda: Started(ours)),
      Side("transformers, flattening collator", lambda: Started(_flattened(rows)), ("torch", "transformers")),
      Side("numpy, padding to the longest", lambda: Started(_padded(items.tokens))),
    ],
    check=check,
  )


def _flattened(rows: list[dict[str, Any]]) -> Callable[[int], tuple[int, int]]:
  """Makes one long row with restarting positions, which flash attention takes."""
  from transformers import DataCollatorWithFlattening

  collate = DataCollatorWithFlattening(return_tensors="pt")

  def call(_: int) -> tuple[int, int]:
    tokens = collate(rows)["input_ids"].numel()
    return tokens, tokens

  return call


def _padded(tokens: Ragged) -> Callable[[int], tuple[int, int]]:
  def call(_: int) -> tuple[int, int]:
    mask = np.arange(tokens.lengths.max()) < tokens.lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = tokens.values
    return int(mask.sum()), ids.size

  return call
