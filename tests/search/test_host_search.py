"""Search on the host equals brute force."""

import numpy as np

from tests.helpers.search_cases import brute_force, integers
from vixml_jax.search import host_search
from vixml_jax.search.host_search import search_rows


def test_scores_over_several_blocks_equal_brute_force(monkeypatch):
  monkeypatch.setattr(host_search, "LABELS_PER_BLOCK", 16)
  monkeypatch.setattr(host_search, "QUERIES_PER_BLOCK", 3)
  labels, queries = integers(120, 0), integers(8, 1)
  rows = np.arange(0, 120, 3)
  scores, ids = search_rows(labels, rows, queries, 7)
  expected_scores, expected_ids = brute_force(labels, queries, 7, np.isin(np.arange(120), rows)[None])
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)
