"""Search that leaves out labels keeps k results, with every kind of index."""

import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, integers, mesh_of_two, needs_scann, normal
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import make_index, search_excluding


@pytest.mark.parametrize("k", [4, 30])
def test_search_excluding_equals_brute_force_over_the_other_labels(k):
  rng = np.random.default_rng(0)
  labels, queries = integers(23, 0), integers(30, 1)
  best = brute_force(labels, queries, 23)[1]  # Leaving out the best labels of a query changes its results most.
  rows = [best[i, :n].tolist() for i, n in enumerate(rng.integers(0, 6, 30))]
  rows[7] = list(range(23))
  index = ExactIndex(labels, mesh_of_two())
  scores, ids = search_excluding(index, queries, k, Ragged.from_rows(rows), query_chunk=8)
  permitted = np.asarray([[label not in row for label in range(23)] for row in rows])
  expected_scores, expected_ids = brute_force(labels, queries, k, permitted)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)


def test_search_excluding_nothing_is_plain_search():
  labels, queries = integers(23, 0), integers(30, 1)
  index = ExactIndex(labels, mesh_of_two())
  expected = index.search(queries, 4)
  empty = Ragged(np.zeros(0, np.int32), np.zeros(31, np.int64))
  for exclude in (None, empty):
    result = search_excluding(index, queries, 4, exclude, query_chunk=8)
    np.testing.assert_array_equal(result[0], expected[0])
    np.testing.assert_array_equal(result[1], expected[1])


@needs_scann
def test_scann_excluding_equals_exact_excluding():
  labels, queries = normal(200, 0), normal(100, 1)
  exclude = Ragged.from_rows([[query % 200, (7 * query) % 200] for query in range(100)])
  expected = search_excluding(make_index("exact", labels, mesh_of_two()), queries, 5, exclude)
  result = search_excluding(make_index("scann", labels), queries, 5, exclude)
  np.testing.assert_array_equal(result[1], expected[1])


def test_an_unknown_kind_of_search_is_named_with_the_known_ones():
  with pytest.raises(InputError, match=r"'faiss'.*exact, scann"):
    make_index("faiss", integers(4, 0))
