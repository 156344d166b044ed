"""Items of one length are placed together where best-fit decreasing places them one by one."""

import numpy as np
import pytest

from vixml_jax.input.best_fit import assign_rows


def one_by_one(lengths, row_length, max_slots):
  """Best-fit decreasing item by item: row, slot and start of each item."""
  places = np.zeros((3, len(lengths)), np.int64)
  free, used = [], []
  newest_last = []  # Rows in the order in which they were filled.
  for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
    size = lengths[item]
    fitting = [row for row in newest_last if free[row] >= size and free[row] > 0 and used[row] < max_slots]
    row = min(reversed(fitting), key=lambda row: free[row], default=None)
    if row is None:
      row = len(free)
      free.append(row_length)
      used.append(0)
    else:
      newest_last.remove(row)
    newest_last.append(row)
    places[:, item] = row, used[row], row_length - free[row]
    free[row] -= size
    used[row] += 1
  return places


def random_lengths(rng, row_length, count):
  """Lengths 0 to a random maximum, some of them frequent."""
  lengths = rng.integers(0, rng.integers(0, row_length + 1) + 1, count)
  return np.where(rng.random(count) < rng.random(), lengths[:1] if count else 0, lengths)


@pytest.mark.parametrize("count", [0, 1, 2, 60])
@pytest.mark.parametrize("max_slots", [1, 2, 5, 40])
def test_places_are_those_of_best_fit_decreasing_item_by_item(count, max_slots):
  rng = np.random.default_rng(count)
  for row_length in (1, 2, 7, 16, 41, 300):
    for _ in range(12):
      lengths = random_lengths(rng, row_length, count)
      found = assign_rows(lengths, row_length, max_slots)
      np.testing.assert_array_equal(found, one_by_one(lengths.tolist(), row_length, max_slots))
      assert {place.dtype for place in found} == {np.dtype(np.int64)}
