"""Sizes rounded up, so that arrays of many sizes run a handful of compiled programs."""


def next_power_of_two(count: int) -> int:
  """Returns the least power of two that is not below `count`; 1 for 0."""
  return 1 << max(count - 1, 0).bit_length()
