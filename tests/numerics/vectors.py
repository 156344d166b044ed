"""Rows of vectors that are hard on numbers."""

import numpy as np


def hostile_rows(rng: np.random.Generator, count: int, dim: int, largest: int = 30) -> np.ndarray:
  """Returns float32 rows: random, equal or opposite to the row before, zero, along an axis, of norm 1e-30 to 1e30.

  Args:
    rng: Source of all draws.
    count: Number of rows.
    dim: Length of a row.
    largest: Greatest exponent of a norm; the least is its negative.
  """
  rows = rng.normal(size=(count, dim))
  for row in range(count):
    kind = rng.integers(10)
    if kind == 0 and row:
      rows[row] = rows[row - 1]
    elif kind == 1 and row:
      rows[row] = -rows[row - 1]
    elif kind == 2:
      rows[row] = 0
    elif kind == 3:
      rows[row] = np.eye(dim)[rng.integers(dim)]
    elif kind == 4:
      rows[row] *= 10.0 ** rng.integers(-largest, largest + 1)
  return rows.astype(np.float32)
