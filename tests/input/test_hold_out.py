"""Held-out queries: near-duplicates are on the same side, and the seed decides."""

import numpy as np

from vixml_jax.input.hold_out import hold_out
from vixml_jax.ragged import Ragged


def test_queries_that_differ_in_word_order_or_a_frequent_word_are_held_out_together():
  rng = np.random.default_rng(0)
  rows = [rng.choice(np.arange(5, 500), 2, replace=False) for _ in range(2000)]
  tokens = Ragged.from_rows(
    [[1, *row, 2] for row in rows] + [[1, *row[::-1], 2] for row in rows] + [[1, *row, 3, 2] for row in rows]
  )
  held_out = hold_out(tokens, 0.1, seed=0)
  np.testing.assert_array_equal(held_out[:2000], held_out[2000:4000])
  np.testing.assert_array_equal(held_out[:2000], held_out[4000:])
  assert 0.07 < held_out.mean() < 0.13
  assert not hold_out(tokens, 0.0, seed=0).any()
  assert (hold_out(tokens, 0.1, seed=1) != held_out).any()


def test_queries_that_only_have_tokens_of_every_query_are_not_all_held_out():
  """Of many seeds, about a tenth holds them out, all together."""
  tokens = Ragged.from_rows([[1, 7 + row, 2] for row in range(50)] + [[1, 2]] * 5)
  sides = [hold_out(tokens, 0.1, seed)[50:] for seed in range(200)]
  assert all(side.all() or not side.any() for side in sides)
  assert 0.03 < np.mean(sides) < 0.2
