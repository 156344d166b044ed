"""Measures search over float32, int8 and bit vectors: bytes, memory, speed, and recall against float32.

  .venv/bin/python -m benchmarks.small_vectors --output=DIR [--labels=1305265] [--dim=768] [--groups=1000]
      [--queries=512] [--k=100]

Each type is searched by a process of its own, through `VectorForm` over a memory-mapped file of float32 vectors, which
is written to the output folder. The vectors are synthetic, of unit norm around `--groups` centers; queries are drawn
like labels. "memory" is the memory of the process after the searches beyond that of importing JAX, without mapped
files, and "peak" its greatest value, mapped files included. "one query" is the median time of a search for one query,
of 20. The machine must be idle.
"""

import argparse
import os
from pathlib import Path
import statistics
import subprocess
import sys
import time

import jax
import numpy as np

from benchmarks.bench.data import unit_vectors
from benchmarks.full_size import matmul_rate
from vixml_jax.search.compact_index import CompactIndex
from vixml_jax.search.membership import overlap
from vixml_jax.search.vector_codes import DTYPES
from vixml_jax.search.vector_form import VectorForm

_LABELS, _QUERIES, _WANTED = "labels.npy", "queries.npy", "float32_ids.npy"
_SINGLE = 20
_SEED_OF_QUERIES = 2


def write_vectors(flags: argparse.Namespace) -> None:
  """Writes labels and queries."""
  flags.output.mkdir(parents=True, exist_ok=True)
  np.save(flags.output / _LABELS, unit_vectors(flags.labels, flags.dim, flags.groups, seed=1))
  np.save(flags.output / _QUERIES, unit_vectors(flags.queries, flags.dim, flags.groups, seed=_SEED_OF_QUERIES))


def measure(folder: Path, dtype: str, k: int) -> None:
  """Prints one line on the search over one type; float32 writes what the others are compared with."""
  jax.device_put(np.zeros(1)).block_until_ready()
  before = _memory("RssAnon")
  labels = np.load(folder / _LABELS, mmap_mode="r")
  queries = np.load(folder / _QUERIES)
  form = VectorForm(dtype)
  started = time.perf_counter()
  index = form.make_index(labels)
  built = time.perf_counter() - started
  index.search(queries, k)  # Compiles.
  started = time.perf_counter()
  _, ids = index.search(queries, k)
  rate = len(queries) / (time.perf_counter() - started)
  index.search(queries[:1], k)
  single = []
  for number in range(_SINGLE):
    started = time.perf_counter()
    index.search(queries[number : number + 1], k)
    single.append(time.perf_counter() - started)
  if dtype == "float32":
    np.save(folder / _WANTED, ids)
  recall = overlap(ids, np.load(folder / _WANTED))
  proof = (
    f", {index.num_unproven} searches without proof" if isinstance(index, CompactIndex) and dtype == "int8" else ""
  )
  print(
    f"{dtype:<8} {form.bytes_per_label(labels.shape[1]):>5,} bytes a label, memory {_memory('RssAnon') - before:5.2f} "
    f"GiB, peak {_memory('VmHWM'):5.2f} GiB, built in {built:4.1f} s, {rate:6.1f} queries/s, one query "
    f"{1e3 * statistics.median(single):6.1f} ms, recall@{k} {100 * recall:.2f} %{proof}",
    flush=True,
  )


def _memory(name: str) -> float:
  """Returns a size of the process that Linux lists, in GiB."""
  lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def main() -> None:
  """Writes the vectors and measures each type in a process of its own."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--output", type=Path, required=True, help="folder of the vectors")
  parser.add_argument("--labels", type=int, default=1_305_265)
  parser.add_argument("--dim", type=int, default=768)
  parser.add_argument("--groups", type=int, default=1_000)
  parser.add_argument("--queries", type=int, default=512)
  parser.add_argument("--k", type=int, default=100)
  parser.add_argument("--dtype", choices=DTYPES, help="measure one type in this process, with vectors that exist")
  flags = parser.parse_args()
  if flags.dtype:
    measure(flags.output, flags.dtype, flags.k)
    return
  print(
    f"{os.cpu_count()} cores, float32 products of 4096 x 4096: {matmul_rate():.0f} GFLOP/s; {flags.labels:,} labels of "
    f"{flags.dim} dimensions, {flags.queries} queries",
    flush=True,
  )
  write_vectors(flags)
  for dtype in DTYPES:
    command = [sys.executable, "-m", "benchmarks.small_vectors", f"--output={flags.output}", f"--k={flags.k}"]
    subprocess.run([*command, f"--dtype={dtype}"], check=True)


if __name__ == "__main__":
  main()
