"""Sizes of blocks and positions of samples: rounded up, divisors, at equal distances."""

import numpy as np


def next_power_of_two(count: int) -> int:
  """Returns the smallest power of two that is at least `count`; 1 for 0.

  >>> [next_power_of_two(count) for count in (0, 1, 3, 4, 5)]
  [1, 1, 4, 4, 8]
  """
  return 1 << max(count - 1, 0).bit_length()


def largest_divisor(number: int, at_most: int) -> int:
  """Returns the largest divisor of a number that is not above `at_most`.

  >>> largest_divisor(8784, 4096), largest_divisor(7, 4)
  (2928, 1)
  """
  return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)


def at_equal_distances(number: int, at_most: int) -> np.ndarray:
  """Returns at most `at_most` different positions among `number`, ascending int64, at equal distances.

  >>> at_equal_distances(9, 3).tolist(), at_equal_distances(2, 3).tolist(), at_equal_distances(0, 3).tolist()
  ([0, 4, 8], [0, 1], [])
  """
  return np.unique(np.linspace(0, number - 1, min(at_most, number)).astype(np.int64))
