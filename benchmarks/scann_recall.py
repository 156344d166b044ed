"""Measures recall and speed of ScaNN at the recalls that are asked for (`eval.scann_recall`).

  .venv/bin/python -m benchmarks.scann_recall --labels=131072 --dim=384 --groups=1000 --queries=1000

The settings of search are chosen for each recall on half of the queries, and measured on the others. Embeddings are
synthetic unit vectors around `--groups` centers; queries are drawn like labels.
"""

import argparse
import time

import numpy as np

from benchmarks.bench.data import unit_vectors
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.scann_index import ScannIndex
from vixml_jax.search.scann_recall import QuerySample, RecallGoal, measure_recall, reach_recall

_TARGETS = (0.90, 0.95, 0.98, 0.99)


def recall(labels: np.ndarray, queries: np.ndarray) -> None:
  """Prints recall and speed of ScaNN for each target."""
  exact_index = ExactIndex(labels)
  start = time.process_time()
  scann = ScannIndex(labels)
  print(f"built in {time.process_time() - start:.1f} s of CPU time: {scann.parameters}", flush=True)
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
  """Makes the vectors and prints a line for each recall."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--labels", type=int, default=131_072)
  parser.add_argument("--dim", type=int, default=384)
  parser.add_argument("--queries", type=int, default=1_000)
  parser.add_argument("--groups", type=int, default=1_000)
  flags = parser.parse_args()
  recall(
    unit_vectors(flags.labels, flags.dim, flags.groups, seed=1),
    unit_vectors(flags.queries, flags.dim, flags.groups, seed=2),
  )


if __name__ == "__main__":
  main()
