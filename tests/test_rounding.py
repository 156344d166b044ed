"""Rounding of sizes."""

from vixml_jax.rounding import next_power_of_two


def test_counts_are_rounded_up_to_powers_of_two():
  assert [next_power_of_two(n) for n in (0, 1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 4, 4, 8, 8, 16]
