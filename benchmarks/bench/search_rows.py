"""Rows of search: the labels of highest inner product, exactly and approximately."""

from collections.abc import Callable
import dataclasses
import functools
import math
import os
import time
from typing import Any

import jax
import numpy as np

from benchmarks.bench.data import unit_vectors
from benchmarks.bench.harness import OURS, Check, Cost, Side, Started, UnavailableError, Work
from vixml_jax import sharding
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex, scann_available

_LEAST_OVERLAP = 0.999
_RECALL = 0.9
_EF_SEARCH = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)
_SHARES_OF_LEAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_REORDER = (50, 100, 200, 500)
_LINKS, _EFFORT = 32, 200
_TORCH_BLOCK = 65_536

Search = Callable[[], np.ndarray]


def exact_search(size: str) -> Work:
  """Exact search of the top 100 in float32, at the number of labels of LF-AmazonTitles-1.3M on a GPU."""
  return _exact(
    *{
      "tiny": (600, 16, 32, 10, 50),
      "cpu": (262_144, 768, 1024, 100, 50_000),
      "gpu": (1_305_265, 768, 2048, 100, 50_000),
    }[size]
  )


def exact_search_10k(size: str) -> Work:
  """Exact search of the top 10 of 10,000 labels, as for tags or categories."""
  labels, dim, queries = {"tiny": (1100, 16, 32), "cpu": (10_000, 384, 8192), "gpu": (10_000, 384, 65_536)}[size]
  return _exact(labels, dim, queries, k=10, groups=labels // 10)


def _exact(labels: int, dim: int, queries: int, k: int, groups: int) -> Work:
  vectors, asked = unit_vectors(labels, dim, groups, seed=1), unit_vectors(queries, dim, groups, seed=2)

  def check(ours: np.ndarray, theirs: np.ndarray) -> Check:
    share = overlap(theirs, ours)
    return Check(share >= _LEAST_OVERLAP, f"{share:.3%} of the top {k} are the same")

  return Work(
    what=f"{queries:,} queries among {labels:,} labels of {dim} dimensions, top {k}",
    unit="queries",
    units=queries,
    sides=[
      Side(OURS, lambda: _ours(vectors, asked, k)),
      Side("faiss IndexFlatIP on the CPU", lambda: _faiss_flat(vectors, asked, k), ("faiss-cpu",)),
      Side("torch, matmul and topk", lambda: _torch(vectors, asked, k), ("torch",)),
    ],
    check=check,
    cost=Cost("flops", 2.0 * queries * labels * dim),
  )


def _ours(vectors: np.ndarray, queries: np.ndarray, k: int) -> Started:
  index = ExactIndex(vectors, sharding.make_mesh(devices=jax.devices()[:1]))
  return Started(lambda _: index.search(queries, k)[1])


def _faiss_flat(vectors: np.ndarray, queries: np.ndarray, k: int) -> Started:
  index = _faiss().IndexFlatIP(vectors.shape[1])
  index.add(vectors)
  return Started(lambda _: index.search(queries, k)[1])


def _faiss() -> Any:
  """Returns the module faiss, which uses all CPUs of the process."""
  import faiss

  faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
  return faiss


def _torch(vectors: np.ndarray, queries: np.ndarray, k: int) -> Started:
  """Scores blocks of labels and keeps the best of each, which are merged at the end."""
  import torch

  from benchmarks.bench.torch_device import device

  labels, asked = torch.from_numpy(vectors).to(device()), torch.from_numpy(queries)

  def search(_: int) -> np.ndarray:
    with torch.inference_mode():
      on_device = asked.to(device())
      scores, ids = [], []
      for start in range(0, len(labels), _TORCH_BLOCK):
        block = labels[start : start + _TORCH_BLOCK]
        best = (on_device @ block.T).topk(min(k, len(block)), dim=1)
        scores.append(best.values)
        ids.append(best.indices + start)
      order = torch.cat(scores, dim=1).topk(k, dim=1).indices
      return torch.cat(ids, dim=1).gather(1, order).cpu().numpy()

  return Started(search)


def approximate_search(size: str) -> Work:
  """Approximate search on the CPU: the fastest setting of ScaNN, and of HNSW, with a recall@10 of at least 0.9."""
  labels, dim, queries, k, groups = {
    "tiny": (2_000, 16, 64, 10, 50),
    "cpu": (131_073, 384, 1024, 10, 50_000),
    "gpu": (131_073, 384, 1024, 10, 50_000),
  }[size]
  vectors, asked = unit_vectors(labels, dim, groups, seed=1), unit_vectors(queries, dim, groups, seed=2)
  wanted = functools.cache(lambda: ExactIndex(vectors).search(asked, k)[1])

  def check(ours: tuple[float, str], theirs: tuple[float, str]) -> Check:
    least = min(ours[0], theirs[0])
    return Check(least >= _RECALL, f"recall {theirs[0]:.4f} ({theirs[1]}), ours {ours[0]:.4f} ({ours[1]})")

  return Work(
    what=f"{queries:,} queries among {labels:,} labels of {dim} dimensions, recall@{k} at least {_RECALL}",
    unit="queries",
    units=queries,
    sides=[
      Side(f"{OURS}, ScaNN", lambda: _scann(vectors, asked, k, wanted())),
      Side(
        f"faiss HNSW, M {_LINKS}, efConstruction {_EFFORT}", lambda: _hnsw(vectors, asked, k, wanted()), ("faiss-cpu",)
      ),
    ],
    check=check,
  )


def _scann(vectors: np.ndarray, queries: np.ndarray, k: int, wanted: np.ndarray) -> Started:
  available, reason = scann_available()
  if not available:
    raise UnavailableError(reason)
  index = ScannIndex(vectors)
  built = index.parameters

  def search() -> np.ndarray:
    return index.search(queries, k)[1]

  def use(setting: tuple[int, int]) -> None:
    index.parameters = dataclasses.replace(built, leaves_to_search=setting[0], reorder=setting[1])

  leaves = sorted({math.ceil(share * built.leaves) for share in _SHARES_OF_LEAVES})
  settings = [(number, reorder) for number in leaves for reorder in (_REORDER if built.reorder else (0,))]
  recall, best = _fastest(search, use, settings, wanted)
  return Started(lambda _: search(), (recall, f"leaves {best[0]}, reorder {best[1]}"))


def _hnsw(vectors: np.ndarray, queries: np.ndarray, k: int, wanted: np.ndarray) -> Started:
  faiss = _faiss()
  index = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
  index.hnsw.efConstruction = _EFFORT
  index.add(vectors)

  def search() -> np.ndarray:
    return index.search(queries, k)[1]

  def use(setting: int) -> None:
    index.hnsw.efSearch = setting

  recall, best = _fastest(search, use, list(_EF_SEARCH), wanted)
  return Started(lambda _: search(), (recall, f"efSearch {best}"))


def _fastest(search: Search, use: Callable[[Any], None], settings: list[Any], wanted: np.ndarray) -> tuple[float, Any]:
  """Tries all settings once, sets the fastest one with the recall, or that of the highest recall; returns both."""
  tried = []
  for setting in settings:
    use(setting)
    started = time.perf_counter()
    found = search()
    tried.append((overlap(found, wanted), time.perf_counter() - started, setting))
  enough = [one for one in tried if one[0] >= _RECALL]
  recall, _, best = min(enough, key=lambda one: one[1]) if enough else max(tried, key=lambda one: one[0])
  use(best)
  return recall, best
