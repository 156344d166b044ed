"""Holds out training queries to choose settings on, near-duplicates together."""

import numpy as np

from vixml_jax.ragged import Ragged


def hold_out(tokens: Ragged, fraction: float, seed: int) -> np.ndarray:
  """Picks queries by a hash of the set of their tokens.

  Queries whose texts have the same words, in whatever order, fall on the same side, so that held-out
  queries are as new to the model as test queries of a split by concept.

  Args:
    tokens: token ids of all training queries, N rows.
    fraction: share to hold out, 0 <= fraction < 1.
    seed: chooses the hash.

  Returns:
    bool [N], True for a held-out query.
  """
  if fraction <= 0:
    return np.zeros(len(tokens), bool)
  vocabulary = int(tokens.values.max(initial=0)) + 1
  # A random 64-bit number a token, summed with wrap-around: order does not matter.
  rng = np.random.default_rng((seed, 2))
  codes = rng.integers(0, 2**64, vocabulary, dtype=np.uint64)
  rows = tokens.row_ids()
  pairs = rows * vocabulary + tokens.values  # Counts a repeated token once.
  pairs = np.unique(pairs)
  sums = np.zeros(len(tokens), np.uint64)
  np.add.at(sums, pairs // vocabulary, codes[pairs % vocabulary])
  return sums < np.uint64(min(fraction, 1.0) * 2**64)
