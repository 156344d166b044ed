"""Membership of ids in rows equals that of Python's sets."""

import numpy as np
import pytest

from vixml_jax.ragged import Ragged
from vixml_jax.search.membership import drop_members, is_in_row


def test_membership_equals_that_of_sets():
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, 30, rng.integers(0, 6)).tolist() for _ in range(40)]
  ids = rng.integers(-1, 30, (40, 7))
  expected = [[i in row for i in found] for found, row in zip(ids.tolist(), rows, strict=True)]
  np.testing.assert_array_equal(is_in_row(ids, Ragged.from_rows(rows)), expected)


def test_queries_may_share_a_row_or_have_none():
  ids = np.asarray([[3, 4], [3, 4], [3, -1]])
  found = is_in_row(ids, Ragged.from_rows([[4], [3]]), np.asarray([1, -1, 1]))
  assert found.tolist() == [[True, False], [False, False], [True, False]]


def test_dropped_members_leave_their_places_to_the_next_results():
  scores = np.asarray([[5, 4, 3], [5, 4, 3]], np.float32)
  ids = np.asarray([[7, 8, 9], [7, 8, 9]], np.int32)
  scores, ids = drop_members(scores, ids, Ragged.from_rows([[7, 1], [8, 9]]), 2)
  assert ids.tolist() == [[8, 9], [7, -1]] and scores.tolist() == [[4, 3], [5, -np.inf]]


def test_numbers_of_rows_must_agree():
  with pytest.raises(ValueError, match="1 rows of ids but 2 rows"):
    is_in_row(np.zeros((1, 3), int), Ragged.from_rows([[1], [2]]))
