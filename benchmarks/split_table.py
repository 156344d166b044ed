"""Measures how long the split of a table takes, and its memory: texts that are nearly the same are on one side.

  .venv/bin/python -m benchmarks.split_table [--rows=2000000] [--copies=0.1]

Texts are sets of 4 to 15 words, and a word is the more frequent the smaller its number. A share of the texts are copies
of others with one word replaced. Prints the share of copies of at least 9 words on the side of their originals.
"""

import argparse
import resource
import time

import numpy as np

from vixml_jax.input.near_duplicates import split_hashes
from vixml_jax.ragged import Ragged, offsets_of

_WORDS = 300_000
_FRACTION = 0.1


def main() -> None:
  """Makes texts, splits them, and prints a line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=2_000_000, help="number of texts")
  parser.add_argument("--copies", type=float, default=0.1, help="share of the texts that are copies of others")
  arguments = parser.parse_args()
  tokens, originals, copies = make_texts(arguments.rows, arguments.copies)
  before, started, busy = _peak_gib(), time.monotonic(), time.process_time()
  is_test = split_hashes(tokens, seed=0) < np.uint64(_FRACTION * 2**64)
  seconds, busy = time.monotonic() - started, time.process_time() - busy
  long = tokens.lengths[copies] >= 9
  together = (is_test[originals] == is_test[copies])[long].mean()
  print(
    f"{len(tokens):,} texts, {len(tokens.values):,} words: {seconds:.0f} s ({busy:.0f} s of one core), "
    f"peak {_peak_gib():.2f} GiB, of which {before:.2f} GiB before; {is_test.mean():.2%} for testing; "
    f"{together:.2%} of long copies on the side of their originals"
  )


def make_texts(rows: int, copies: float) -> tuple[Ragged, np.ndarray, np.ndarray]:
  """Returns texts as ids of words, and the rows of originals and of their copies with one word replaced."""
  rng = np.random.default_rng(0)
  number = int(rows * copies)
  originals = rng.integers(0, rows - number, number)
  lengths = rng.integers(4, 16, rows)
  lengths[rows - number :] = lengths[originals]
  offsets = offsets_of(lengths)
  values = (_WORDS ** rng.random(offsets[-1])).astype(np.int32)  # Log-uniform: as frequent as by Zipf's law.
  for original, copy in zip(originals, range(rows - number, rows), strict=True):
    values[offsets[copy] : offsets[copy + 1] - 1] = values[offsets[original] : offsets[original + 1] - 1]
  return Ragged(values, offsets), originals, np.arange(rows - number, rows)


def _peak_gib() -> float:
  """Returns the largest resident memory of this process so far."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
  main()
