"""Rounds sizes up, so that arrays of many sizes need only a few compiled programs."""


def next_power_of_two(count: int) -> int:
  """Returns the smallest power of two that is at least `count`; 1 for 0.

  >>> [next_power_of_two(count) for count in (0, 1, 3, 4, 5)]
  [1, 1, 4, 4, 8]
  """
  return 1 << max(count - 1, 0).bit_length()
