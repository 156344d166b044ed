"""Labels that are ranked first in place of true ones."""

import collections

import numpy as np

from vixml_jax.evaluation.confusions import ConfusionCounts
from vixml_jax.ragged import Ragged


def test_counts_are_those_of_a_loop_over_all_queries():
  rng = np.random.default_rng(0)
  first = rng.integers(-1, 6, 400)
  rows = [rng.choice(6, rng.integers(0, 3), replace=False).tolist() for _ in range(400)]
  counts = ConfusionCounts(6)
  for start in range(0, 400, 150):
    counts.add(first[start : start + 150], Ragged.from_rows(rows[start : start + 150]))
  expected = collections.Counter(
    (int(label), true)
    for label, row in zip(first, rows, strict=True)
    if label >= 0 and label not in row
    for true in row
  )
  found = counts.most(100)
  assert {(a, b): count for a, b, count in found.tolist()} == {pair: n for pair, n in expected.items() if n > 1}
  assert found[:, 2].tolist() == sorted(found[:, 2].tolist(), reverse=True)
  assert counts.most(3).tolist() == found[:3].tolist()


def test_pairs_of_one_query_are_left_out():
  counts = ConfusionCounts(3)
  counts.add(np.array([0, 1]), Ragged.from_rows([[1], [2]]))
  assert counts.most(10).shape == (0, 3)
