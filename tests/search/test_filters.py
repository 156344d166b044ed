"""Filtered search equals brute force over the labels that each query may have, whichever way is taken."""

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import filters as filters_module
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.filters import Filters, IdSets, search_filtered
from vixml_jax.search.host_search import search_rows
from vixml_jax.search.scann_index import ScannIndex, ScannParameters, scann_available

NUM_LABELS, NUM_QUERIES, K = 120, 40, 7
TREE = ScannParameters(leaves=12, leaves_to_search=2, reorder=40, dimensions_per_block=2, soar=True, bfloat16=False)

needs_scann = pytest.mark.skipif(not scann_available()[0], reason=scann_available()[1])


def _mesh(count=2):
  return Mesh(np.asarray(jax.devices()[:count]), ("data",))


def _integers(rows, seed):
  """Small whole numbers: inner products are exact in float32, and many of them are equal."""
  return np.random.default_rng(seed).integers(-2, 3, (rows, 6)).astype(np.float32)


def _normal(rows, seed):
  return np.random.default_rng(seed).normal(size=(rows, 6)).astype(np.float32)


def _brute_force(labels, query, may_have, k):
  """Scores and ids of one query over the labels that it may have."""
  ids = sorted(may_have)
  scores = labels[ids].astype(np.float64) @ query
  order = np.argsort(-scores, kind="stable")[:k]
  missing = k - len(order)
  return [*scores[order], *[-np.inf] * missing], [*(ids[place] for place in order), *[-1] * missing]


def _random_filters(seed):
  """Shared, own, empty and missing allow sets beside deny sets of all sizes, the best labels among those denied."""
  rng = np.random.default_rng(seed)
  shared = [rng.choice(NUM_LABELS, size, replace=False).tolist() for size in (0, 3, 30, 110)]
  allow, deny = [], []
  for query in range(NUM_QUERIES):
    kind = query % 7
    allow.append(None if kind > 4 else shared[kind] if kind < 4 else rng.choice(NUM_LABELS, 50).tolist())
    deny.append(rng.choice(NUM_LABELS, rng.choice([0, 2, 5, 60, 500])).tolist() if query % 3 else None)
  deny[6] = list(range(NUM_LABELS))
  return allow, deny


def _expected(labels, live, queries, allow, deny, k):
  all_ids = set(np.flatnonzero(live).tolist())
  rows = [
    _brute_force(labels, query, (all_ids if allowed is None else all_ids & {*allowed}) - {*(denied or ())}, k)
    for query, allowed, denied in zip(queries, allow, deny, strict=True)
  ]
  return np.asarray([scores for scores, _ in rows]), np.asarray([ids for _, ids in rows])


# Which of the ways a filter takes is a matter of these limits.
@pytest.fixture(params=[(16_384, 1_024), (10, 3), (0, 0)], ids=["by gathering", "by all ways", "by masking"])
def limits(request, monkeypatch):
  monkeypatch.setattr(filters_module, "GATHER_AT_MOST", request.param[0])
  monkeypatch.setattr(filters_module, "OVERFETCH_AT_MOST", request.param[1])


@pytest.mark.parametrize("k", [1, K, NUM_LABELS + 5])
def test_exact_search_with_filters_equals_brute_force(limits, k):
  labels, queries = _integers(NUM_LABELS, 0), _integers(NUM_QUERIES, 1)
  live = np.random.default_rng(3).random(NUM_LABELS) > 0.2
  allow, deny = _random_filters(k)
  index = ExactIndex(labels, _mesh(), rows=np.flatnonzero(live), block=16, query_chunk=16)
  given = Filters(IdSets.from_rows(allow), IdSets.from_rows(deny))
  scores, ids = search_filtered(index, labels, live, queries, k, given)
  expected_scores, expected_ids = _expected(labels, live, queries, allow, deny, k)
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)


@needs_scann
@pytest.mark.parametrize("k", [K, NUM_LABELS + 5])
def test_scann_with_filters_equals_brute_force_where_scann_is_exact(limits, k):
  labels, queries = _normal(NUM_LABELS, 0), _normal(NUM_QUERIES, 1)
  live = np.random.default_rng(3).random(NUM_LABELS) > 0.2
  allow, deny = _random_filters(k)
  index = ScannIndex(labels, rows=np.flatnonzero(live))
  given = Filters(IdSets.from_rows(allow), IdSets.from_rows(deny))
  _, ids = search_filtered(index, labels, live, queries, k, given)
  np.testing.assert_array_equal(ids, _expected(labels, live, queries, allow, deny, k)[1])


@needs_scann
def test_scann_that_sees_few_leaves_still_gives_k_labels_where_a_query_may_have_k(limits):
  labels, queries = _normal(NUM_LABELS, 0), _normal(NUM_QUERIES, 1)
  allow, deny = _random_filters(0)
  index = ScannIndex(labels, k=K, parameters=TREE)
  assert np.any(index.search(queries, NUM_LABELS)[1] < 0), "two leaves of twelve must not hold all labels"
  given = Filters(IdSets.from_rows(allow), IdSets.from_rows(deny))
  scores, ids = search_filtered(index, labels, np.ones(NUM_LABELS, bool), queries, 30, given)
  expected = _expected(labels, np.ones(NUM_LABELS, bool), queries, allow, deny, 30)[1]
  np.testing.assert_array_equal((ids >= 0).sum(axis=1), (expected >= 0).sum(axis=1))
  assert np.all(given.permits(ids) == (ids >= 0))
  finite = np.where(ids >= 0, scores, -1e9)
  assert np.all(np.diff(finite, axis=1) <= 0)


def test_many_denied_labels_are_masked_and_few_are_searched_past(monkeypatch):
  labels, queries = _integers(NUM_LABELS, 0), _integers(6, 1)
  index, widths = ExactIndex(labels, _mesh()), []
  search = index.search
  monkeypatch.setattr(index, "search", lambda q, k, *masks: (widths.append((k, len(masks))), search(q, k, *masks))[1])
  monkeypatch.setattr(filters_module, "OVERFETCH_AT_MOST", 4)
  deny = IdSets.from_rows([[0], [0, 1, 2], range(5), None, range(100), range(100)])
  search_filtered(index, labels, np.ones(NUM_LABELS, bool), queries, 3, Filters(deny=deny))
  assert widths == [(3 + 4, 0), (3, 2)], "five and a hundred denied: one pass with two masks, no wider than k"


def test_a_category_shared_by_all_queries_is_one_pass_whatever_each_denies(monkeypatch):
  labels, queries = _integers(NUM_LABELS, 0), _integers(NUM_QUERIES, 1)
  monkeypatch.setattr(filters_module, "GATHER_AT_MOST", 0)
  index, masks = ExactIndex(labels, _mesh()), []
  search = index.search
  monkeypatch.setattr(index, "search", lambda q, k, *given: (masks.append(given[0]), search(q, k, *given))[1])
  category = IdSets.of(Ragged.from_rows([range(0, NUM_LABELS, 2)]), np.zeros(NUM_QUERIES, np.int32))
  deny = IdSets.from_rows([[query] for query in range(NUM_QUERIES)])
  search_filtered(index, labels, np.ones(NUM_LABELS, bool), queries, 3, Filters(category, deny))
  assert [mask.shape for mask in masks] == [(1, NUM_LABELS)]


def test_no_queries_give_no_rows(limits):
  labels = _integers(NUM_LABELS, 0)
  given = Filters(IdSets.from_rows([]), IdSets.from_rows([]))
  scores, ids = search_filtered(ExactIndex(labels, _mesh()), labels, np.ones(NUM_LABELS, bool), labels[:0], 3, given)
  assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("wrong", [NUM_LABELS, -1])
def test_ids_that_are_no_label_s_are_named(wrong):
  labels = _integers(NUM_LABELS, 0)
  sets = IdSets(Ragged.from_rows([[3, wrong]]), np.zeros(1, np.int32))
  with pytest.raises(InputError, match=rf"deny.*no label {wrong}; ids go from 0 to {NUM_LABELS - 1}"):
    search_filtered(ExactIndex(labels, _mesh()), labels, np.ones(NUM_LABELS, bool), labels[:1], 3, Filters(deny=sets))


def test_sets_are_sorted_and_distinct_and_shared_ones_are_held_once():
  sets = IdSets.of(Ragged.from_rows([[5, 1, 5], [], [2]]), [2, 0, 0, -1, 1])
  assert [sets.sets[row].tolist() for row in range(3)] == [[1, 5], [], [2]]
  assert [row.tolist() for row in map(sets.rows().__getitem__, range(5))] == [[2], [1, 5], [1, 5], [], []]
  assert sets.sizes.tolist() == [1, 2, 2, 0, 0]
  taken = sets.take(np.asarray([3, 1, 2]))
  assert len(taken.sets) == 1 and taken.sizes.tolist() == [0, 2, 2]


def test_permits_equals_sets():
  rng = np.random.default_rng(0)
  allow, deny = _random_filters(1)
  ids = rng.integers(-1, NUM_LABELS, (NUM_QUERIES, 9))
  expected = [
    [i >= 0 and (allowed is None or i in allowed) and i not in (denied or ()) for i in row]
    for row, allowed, denied in zip(ids.tolist(), allow, deny, strict=True)
  ]
  given = Filters(IdSets.from_rows(allow), IdSets.from_rows(deny))
  np.testing.assert_array_equal(given.permits(ids), expected)


def test_scores_on_the_host_equal_brute_force_over_blocks_of_labels(monkeypatch):
  monkeypatch.setattr("vixml_jax.search.host_search._LABELS_AT_ONCE", 16)
  monkeypatch.setattr("vixml_jax.search.host_search._QUERIES_AT_ONCE", 3)
  labels, queries = _integers(NUM_LABELS, 0), _integers(8, 1)
  rows = np.arange(0, NUM_LABELS, 3)
  scores, ids = search_rows(labels, rows, queries, K)
  for query in range(8):
    expected = _brute_force(labels, queries[query], rows.tolist(), K)
    assert (scores[query].tolist(), ids[query].tolist()) == (expected[0], expected[1])
