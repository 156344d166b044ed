"""Compares the speed of label search with faiss, in one run on the same data and CPUs.

  .venv/bin/python -m benchmarks.search --part=exact                        # 1,305,265 x 768, with faiss's IndexFlatIP
  .venv/bin/python -m benchmarks.search --part=approximate --labels=131073  # ScaNN with faiss's HNSW
  .venv/bin/python -m benchmarks.search --part=recall --labels=131073       # ScaNN at the recalls that are asked for

The first two need faiss, which is not a dependency of this package: pip install faiss-cpu. Embeddings are synthetic
unit vectors around `--groups` centers; queries are drawn like labels. Both sides use all CPUs of the process.
"""

import argparse
from collections.abc import Callable
import dataclasses
import math
import os
import resource
import statistics
import time
from typing import Any

import jax
import numpy as np

from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.membership import overlap
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.scann_recall import QuerySample, RecallGoal, measure_recall, reach_recall

try:
  import faiss
except ImportError:
  faiss = None

_TARGETS = (0.90, 0.95, 0.98, 0.99)
_EF_SEARCH = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_SHARES_OF_LEAVES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
_REORDER = (50, 100, 200, 500)


def embeddings(rows: int, dim: int, groups: int, seed: int) -> np.ndarray:
  """Returns float32 [rows, D] of unit norm around centers that are the same for every seed."""
  centers = np.random.default_rng(0).standard_normal((groups, dim), np.float32)
  rng = np.random.default_rng(seed)
  out = np.empty((rows, dim), np.float32)
  for start in range(0, rows, 65_536):
    part = out[start : start + 65_536]
    part[:] = centers[rng.integers(0, groups, len(part))]
    part += rng.standard_normal(part.shape, np.float32)
    part /= np.linalg.norm(part, axis=1, keepdims=True)
  return out


def seconds_of(call: Callable[[], object], repeats: int) -> float:
  """Returns the median seconds of the repeats, after a first call that compiles."""
  call()
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def _built(name: str, build: Callable[[], Any]) -> Any:
  """Builds an index, prints seconds and memory, and returns it."""
  start, cpu = time.perf_counter(), time.process_time()
  index = build()
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f"{name}: built in {seconds:.1f} s, {cpu:.1f} s of CPU time, peak RSS so far {peak:.1f} GiB", flush=True)
  return index


def exact(labels: np.ndarray, queries: np.ndarray, k: int, repeats: int) -> None:
  """Times exact search of this package and of faiss; prints queries/s, their ratio, and the share of equal results."""
  ours = _built("vixml_jax exact", lambda: ExactIndex(labels))
  own_seconds = seconds_of(lambda: ours.search(queries, k), repeats)
  _, own_ids = ours.search(queries, k)
  del ours
  flat = faiss.IndexFlatIP(labels.shape[1])
  _built("faiss IndexFlatIP", lambda: flat.add(labels))
  faiss_seconds = seconds_of(lambda: flat.search(queries, k), repeats)
  _, faiss_ids = flat.search(queries, k)
  for name, seconds in (("vixml_jax exact", own_seconds), ("faiss IndexFlatIP", faiss_seconds)):
    print(f"{name:<18} {len(queries) / seconds:10.1f} queries/s   {1e3 * seconds / len(queries):8.3f} ms a query")
  print(
    f"ours / faiss: {faiss_seconds / own_seconds:.2f} times as fast; "
    f"{100 * overlap(own_ids, faiss_ids):.3f} % of the top {k} are the same"
  )


def approximate(labels: np.ndarray, queries: np.ndarray, k: int, repeats: int, links: int, effort: int) -> None:
  """Times ScaNN and HNSW over a sweep of their search settings; prints the fastest of each at equal recall@k."""
  _, wanted = ExactIndex(labels).search(queries, k)
  runs: dict[str, list[tuple[float, float, str]]] = {"ScaNN": [], "faiss HNSW": []}

  def measure(kind: str, setting: str, search: Callable[[], np.ndarray]) -> None:
    recall = overlap(search(), wanted)
    rate = len(queries) / seconds_of(search, repeats)
    runs[kind].append((recall, rate, setting))
    print(f"{kind:<12} {setting:<34} recall@{k} {recall:.4f} {rate:10.1f} queries/s", flush=True)

  scann = _built("ScaNN", lambda: ScannIndex(labels))
  built_with = scann.parameters
  print(f"  {built_with}")
  for leaves in sorted({math.ceil(share * built_with.leaves) for share in _SHARES_OF_LEAVES}):
    for reorder in _REORDER if built_with.reorder else (0,):
      scann.parameters = dataclasses.replace(built_with, leaves_to_search=leaves, reorder=reorder)
      measure("ScaNN", f"leaves {leaves}, reorder {reorder}", lambda: scann.search(queries, k)[1])
  del scann
  hnsw = faiss.IndexHNSWFlat(labels.shape[1], links, faiss.METRIC_INNER_PRODUCT)
  hnsw.hnsw.efConstruction = effort
  _built(f"faiss HNSW, M {links}, efConstruction {effort}", lambda: hnsw.add(labels))
  for breadth in _EF_SEARCH:
    hnsw.hnsw.efSearch = breadth
    measure("faiss HNSW", f"efSearch {breadth}", lambda: hnsw.search(queries, k)[1])
  print(f"\nfastest setting that reaches a recall@{k}:")
  for target in _TARGETS:
    best = {
      kind: max((rate for recall, rate, _ in found if recall >= target), default=None) for kind, found in runs.items()
    }
    rates = [f"{kind} {rate:.0f} queries/s" if rate else f"{kind} never" for kind, rate in best.items()]
    ours, theirs = best.values()
    print(f"  {target:.2f}: " + ", ".join(rates) + (f", ratio {ours / theirs:.2f}" if ours and theirs else ""))


def recall(labels: np.ndarray, queries: np.ndarray) -> None:
  """Prints recall and speed of ScaNN, chosen for each target on half of the queries and measured on the others."""
  exact_index = ExactIndex(labels)
  scann = _built("ScaNN", lambda: ScannIndex(labels))
  print(f"  {scann.parameters}")
  chosen_on, measured_on = QuerySample(queries, "queries").halves()
  for target in (None, *_TARGETS):
    start = time.process_time()
    if target is not None:
      reach_recall(scann, exact_index, RecallGoal(target, chosen_on))
    seconds = time.process_time() - start
    result = measure_recall(scann, exact_index, measured_on)
    start = time.process_time()
    scann.search(measured_on.queries, 100)
    milliseconds = 1e3 * (time.process_time() - start) / len(measured_on.queries)
    print(
      f"{'rules of thumb' if target is None else f'recall {target:.2f}':<15} recall@10 {result['recall@10']:6.2f} % "
      f"recall@100 {result['recall@100']:6.2f} % {result['queries_per_second']:9.1f} queries/s {milliseconds:7.2f} ms "
      f"of CPU time a query, leaves {scann.parameters.leaves_to_search}, reorder {scann.parameters.reorder}, "
      f"chosen in {seconds:.0f} s of CPU time",
      flush=True,
    )


def main() -> None:
  """Runs one part of the comparison."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--part", choices=("exact", "approximate", "recall"), required=True)
  parser.add_argument("--labels", type=int, default=1_305_265)
  parser.add_argument("--dim", type=int, default=768)
  parser.add_argument("--queries", type=int, default=1_024)
  parser.add_argument("--groups", type=int, default=50_000)
  parser.add_argument(
    "--k", type=int, help="labels per query; by default 100 with exact and 10 with approximate search"
  )
  parser.add_argument("--repeats", type=int, default=3)
  parser.add_argument("--links", type=int, default=32, help="M of HNSW")
  parser.add_argument("--effort", type=int, default=200, help="efConstruction of HNSW")
  flags = parser.parse_args()
  cpus = len(os.sched_getaffinity(0))
  if flags.part != "recall":
    if faiss is None:
      parser.error(f"--part={flags.part} needs faiss: pip install faiss-cpu")
    faiss.omp_set_num_threads(cpus)
  print(
    f"{flags.labels:,} labels x {flags.dim} around {flags.groups:,} centers, {flags.queries:,} queries, {cpus} CPUs, "
    f"jax {jax.__version__} on {jax.devices()[0].device_kind}, faiss {faiss.__version__ if faiss else 'not installed'}"
  )
  labels = embeddings(flags.labels, flags.dim, flags.groups, seed=1)
  queries = embeddings(flags.queries, flags.dim, flags.groups, seed=2)
  if flags.part == "exact":
    exact(labels, queries, flags.k or 100, flags.repeats)
  elif flags.part == "recall":
    recall(labels, queries)
  else:
    approximate(labels, queries, flags.k or 10, flags.repeats, flags.links, flags.effort)


if __name__ == "__main__":
  main()
