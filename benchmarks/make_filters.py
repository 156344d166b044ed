"""Measures time and memory of making filters from uids, on a synthetic raw folder of the size of LF-AmazonTitles-1.3M.

  python benchmarks/make_filters.py --folder=FOLDER [--scale=1]

The folder is written if it does not exist (about 0.8 GB at full size). As in the published set, queries and labels are
drawn from the same products, and a query has 22 labels on average.
"""

import argparse
import gzip
import json
from pathlib import Path
import resource
import time

import numpy as np

from vixml_jax.datasets import filters, raw, raw_rows
from vixml_jax.datasets.builders import EXPECTED_COUNTS
from vixml_jax.files import new_folder

_ROWS_PER_DRAW = 50_000
_LABELS_PER_QUERY = 22.2


def main() -> None:
  """Writes the folder, makes the filters and prints both measurements."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=Path, required=True, help="raw folder, written if it does not exist")
  parser.add_argument("--scale", type=float, default=1.0, help="share of the rows of every split")
  arguments = parser.parse_args()
  if not arguments.folder.is_dir():
    write(arguments.folder, arguments.scale)
  print(json.dumps(measure(arguments.folder)))


def measure(folder: Path) -> dict[str, float]:
  """Returns seconds, peak memory of the process in GiB, and numbers of pairs."""
  files = raw.find_files(folder)
  counts = {split: raw_rows.count_rows(found) for split, found in files.items()}
  start, cpu = time.monotonic(), time.process_time()
  made = filters.make_filters(files, counts)
  return {
    "seconds": round(time.monotonic() - start, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1),
    "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    **{f"{split}_pairs": count for split, count in made.metadata["pairs"].items()},
  }


def write(folder: Path, scale: float) -> None:
  """Writes the rows of all splits; nothing else is in the folder."""
  rows = {split: max(1, int(count * scale)) for split, count in EXPECTED_COUNTS["lf_amazon_titles_1_3m"].items()}
  rng = np.random.default_rng(0)
  num_queries = rows["train"] + rows["test"]
  products = rng.permutation(num_queries)
  with new_folder(folder) as work:
    _write_split(work, "labels", rng.choice(num_queries, rows["labels"], replace=False), rng, 0)
    _write_split(work, "train", products[: rows["train"]], rng, rows["labels"])
    _write_split(work, "test", products[rows["train"] :], rng, rows["labels"])


def _write_split(folder: Path, split: str, products: np.ndarray, rng: np.random.Generator, num_labels: int) -> None:
  with gzip.open(folder / raw.SPLITS[split].rows, "wb", 1) as file:
    for start in range(0, len(products), _ROWS_PER_DRAW):
      part = products[start : start + _ROWS_PER_DRAW].tolist()
      sizes = rng.geometric(1 / _LABELS_PER_QUERY, len(part)) if num_labels else np.zeros(len(part), int)
      drawn = np.split((rng.random(sizes.sum()) ** 1.5 * num_labels).astype(int), np.cumsum(sizes)[:-1])
      for product, targets in zip(part, drawn, strict=True):
        row = {"uid": f"B{product:09d}", "title": f"product {product} " + "of a common kind " * 3, "content": ""}
        if num_labels:
          labels = np.unique(targets).tolist()
          row |= {"target_ind": labels, "target_rel": [1.0] * len(labels)}
        file.write((json.dumps(row) + "\n").encode())


if __name__ == "__main__":
  main()
