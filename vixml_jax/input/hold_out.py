"""Holds out training queries for validation, with near-duplicates on the same side."""

import numpy as np

from vixml_jax.ragged import Ragged, ranges

_ROWS_AT_ONCE = 1 << 16


def hold_out(tokens: Ragged, fraction: float, seed: int) -> np.ndarray:
  """Selects queries by `near_duplicate_hashes`.

  So held-out queries are about as new to the model as the test queries of a split by product.

  Args:
    tokens: Token ids of all training queries, N rows.
    fraction: Fraction of the queries to hold out, 0 <= fraction < 1.
    seed: Seed of the hash.

  Returns:
    True for a held-out query, bool [N].
  """
  if fraction <= 0:
    return np.zeros(len(tokens), bool)
  return near_duplicate_hashes(tokens, seed) < np.uint64(min(fraction, 1.0) * 2**64)


def near_duplicate_hashes(tokens: Ragged, seed: int) -> np.ndarray:
  """Returns a hash of the rarer two thirds of the distinct tokens of each query, uint64 [N].

  Queries that differ only in the order of their words or in a frequent word ("arrow left", "left arrow filled") have
  the same hash. Hashes are uniform. All tokens of a query count if each of them is in every query. Memory grows with
  the size of the vocabulary, not with N.

  Args:
    tokens: Token ids of all queries, N rows.
    seed: Seed of the hash.
  """
  vocabulary = int(tokens.values.max(initial=0)) + 1
  # The hash is the sum (mod 2**64) of a random number per token, so the order of the tokens does not matter.
  codes = np.random.default_rng((seed, 2)).integers(0, 2**64, vocabulary, dtype=np.uint64)
  frequencies = np.zeros(vocabulary, np.int64)
  blocks = [slice(start, min(start + _ROWS_AT_ONCE, len(tokens))) for start in range(0, len(tokens), _ROWS_AT_ONCE)]
  for block in blocks:
    frequencies += np.bincount(_distinct(tokens, block, vocabulary)[1], minlength=vocabulary)
  sums = np.zeros(len(tokens), np.uint64)
  for block in blocks:
    rows, values = _distinct(tokens, block, vocabulary)
    informative = frequencies[values] < len(tokens)  # Special tokens are in every row.
    informative |= (np.bincount(rows[informative], minlength=block.stop - block.start) == 0)[rows]
    rows, values = rows[informative], values[informative]
    order = np.lexsort((values, frequencies[values], rows))
    rows, values = rows[order], values[order]
    counts = np.bincount(rows, minlength=block.stop - block.start)
    rare = ranges(0, counts) < -(-2 * counts[rows] // 3)
    np.add.at(sums[block], rows[rare], codes[values[rare]])
  return sums


def _distinct(tokens: Ragged, block: slice, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows of a block, counted from its start, and their distinct tokens, a pair each; ascending."""
  part = tokens.take(np.arange(block.start, block.stop))
  rows, values = np.divmod(np.unique(part.row_ids() * vocabulary + part.values), vocabulary)
  return rows, values
