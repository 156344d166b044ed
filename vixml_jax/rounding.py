"""Sizes of blocks: rounded up, so that few programs are compiled, or such that they divide an array."""


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
