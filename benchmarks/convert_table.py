"""Measures time and memory of the conversion of a synthetic table to a raw folder.

  python benchmarks/convert_table.py --folder=FOLDER [--rows=2000000] [--labels=500000]

The table is written to FOLDER if it is not there. Each row has a uid, a text of 8 words of a vocabulary of 100,000, and
5 labels. Words and labels are drawn with probabilities that fall as one over their rank.
"""

import argparse
from collections.abc import Iterator
import json
from pathlib import Path
import resource
import shutil
import time

import numpy as np
import pyarrow as pa
from pyarrow import csv

from vixml_jax.tables import write_raw_folder

_WORDS, _WORDS_PER_TEXT, _LABELS_PER_ROW, _ROWS_AT_ONCE = 100_000, 8, 5, 50_000


def main() -> None:
  """Writes the table, converts it and prints the measurements."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", type=Path, required=True, help="folder for the table and the raw folder")
  parser.add_argument("--rows", type=int, default=2_000_000, help="number of rows")
  parser.add_argument("--labels", type=int, default=500_000, help="number of labels to draw from")
  arguments = parser.parse_args()
  table = arguments.folder / f"table-{arguments.rows}.csv"
  if not table.exists():
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write(table, arguments.rows, arguments.labels)
    print(f"{table}: written; start again to measure a process that has not written it")
    return
  print(json.dumps(measure(table, arguments.folder / "raw")))


def measure(table: Path, folder: Path) -> dict[str, float]:
  """Converts a table, and returns seconds, peak memory of the process in GiB, and the numbers of rows."""
  shutil.rmtree(folder, ignore_errors=True)
  start, cpu = time.monotonic(), time.process_time()
  found = write_raw_folder(table, folder)
  return {
    "seconds": round(time.monotonic() - start, 1),
    "cpu_seconds": round(time.process_time() - cpu, 1),
    "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    "table_gib": round(table.stat().st_size / 2**30, 2),
    "train": found.num_train,
    "test": found.num_test,
    "labels": found.num_labels,
  }


def write(path: Path, rows: int, labels: int) -> None:
  """Writes the table."""
  batches = _batches(rows, labels)
  first = next(batches)
  with csv.CSVWriter(path, first.schema) as writer:
    writer.write_batch(first)
    for batch in batches:
      writer.write_batch(batch)


def _batches(rows: int, labels: int) -> Iterator[pa.RecordBatch]:
  rng = np.random.default_rng(0)
  for start in range(0, rows, _ROWS_AT_ONCE):
    size = min(_ROWS_AT_ONCE, rows - start)
    yield pa.RecordBatch.from_arrays(
      [
        pa.array([f"uid{row}" for row in range(start, start + size)]),
        _joined(rng, "word", _WORDS, size, _WORDS_PER_TEXT, " "),
        _joined(rng, "label", labels, size, _LABELS_PER_ROW, "|"),
      ],
      ["uid", "text", "labels"],
    )


def _joined(rng: np.random.Generator, prefix: str, vocabulary: int, rows: int, count: int, separator: str) -> pa.Array:
  """Returns texts of words that are drawn with probabilities that fall as one over their rank."""
  ids = np.exp(rng.random((rows, count)) * np.log(vocabulary)).astype(np.int64) - 1
  return pa.array([separator.join(f"{prefix}{number}" for number in row) for row in ids.tolist()])


if __name__ == "__main__":
  main()
