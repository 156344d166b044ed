"""Holds out training queries for validation, with near-duplicates on the same side."""

import numpy as np

from vixml_jax.ragged import Ragged, ranges


def hold_out(tokens: Ragged, fraction: float, seed: int) -> np.ndarray:
  """Selects queries by a hash of the rarer two thirds of their distinct tokens.

  Queries that differ only in the order of their words or in a frequent word ("arrow left", "left arrow filled") are on
  the same side. So held-out queries are about as new to the model as the test queries of a split by product.

  Args:
    tokens: Token ids of all training queries, N rows.
    fraction: Fraction of the queries to hold out, 0 <= fraction < 1.
    seed: Seed of the hash.

  Returns:
    True for a held-out query, bool [N].
  """
  if fraction <= 0:
    return np.zeros(len(tokens), bool)
  vocabulary = int(tokens.values.max(initial=0)) + 1
  # The hash is the sum (mod 2**64) of a random number per token, so the order of the tokens does not matter.
  rng = np.random.default_rng((seed, 2))
  codes = rng.integers(0, 2**64, vocabulary, dtype=np.uint64)
  rows, values = np.divmod(np.unique(tokens.row_ids() * vocabulary + tokens.values), vocabulary)
  frequencies = np.bincount(values, minlength=vocabulary)
  informative = frequencies[values] < len(tokens)  # Special tokens are in every row.
  rows, values = rows[informative], values[informative]
  order = np.lexsort((values, frequencies[values], rows))
  rows, values = rows[order], values[order]
  counts = np.bincount(rows, minlength=len(tokens))
  rank = ranges(0, counts)
  rare = rank < -(-2 * counts[rows] // 3)
  sums = np.zeros(len(tokens), np.uint64)
  np.add.at(sums, rows[rare], codes[values[rare]])
  return sums < np.uint64(min(fraction, 1.0) * 2**64)
