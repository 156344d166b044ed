"""Filtered search equals brute force over the labels that each query may have, with every strategy."""

import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, integers, mesh_of_two, needs_scann, normal
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import filters as filters_module
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.filters import Filters, IdSets, search_filtered
from vixml_jax.search.scann_index import ScannIndex, ScannParameters

NUM_LABELS, NUM_QUERIES, K = 120, 40, 7
ALL_LIVE = np.ones(NUM_LABELS, bool)
TREE = ScannParameters(leaves=12, leaves_to_search=2, reorder=40, dimensions_per_block=2, soar=True, bfloat16=False)


def _random_rows(seed):
  """Allow sets that are shared, own, empty and missing, and deny sets of all sizes."""
  rng = np.random.default_rng(seed)
  shared = [rng.choice(NUM_LABELS, size, replace=False).tolist() for size in (0, 3, 30, 110)]
  allow, deny = [], []
  for query in range(NUM_QUERIES):
    kind = query % 7
    allow.append(None if kind > 4 else shared[kind] if kind < 4 else rng.choice(NUM_LABELS, 50).tolist())
    deny.append(rng.choice(NUM_LABELS, rng.choice([0, 2, 5, 60, 500])).tolist() if query % 3 else None)
  deny[6] = list(range(NUM_LABELS))
  return allow, deny


def _filters(allow, deny):
  return Filters(IdSets.from_rows(allow), IdSets.from_rows(deny))


def _permitted(live, allow, deny):
  """bool [Q, L], which labels each query may have."""
  labels = np.arange(NUM_LABELS)
  return np.asarray(
    [
      live & (True if allowed is None else np.isin(labels, allowed)) & ~np.isin(labels, denied or [])
      for allowed, denied in zip(allow, deny, strict=True)
    ]
  )


@pytest.fixture
def exact_index():
  return ExactIndex(integers(NUM_LABELS, 0), mesh_of_two())


@pytest.fixture
def searches(exact_index, monkeypatch):
  """k and masks of every search of `exact_index`."""
  calls, search = [], exact_index.search
  monkeypatch.setattr(
    exact_index, "search", lambda q, k, *masks: (calls.append((k, masks[:1])), search(q, k, *masks))[1]
  )
  return calls


# Sizes decide on the strategy, so these limits reach all of them.
@pytest.fixture(params=[(16_384, 1_024), (10, 3), (0, 0)], ids=["gather", "all strategies", "mask or widen"])
def limits(request, monkeypatch):
  monkeypatch.setattr(filters_module, "GATHER_AT_MOST", request.param[0])
  monkeypatch.setattr(filters_module, "OVERFETCH_AT_MOST", request.param[1])


@pytest.mark.parametrize("k", [K, NUM_LABELS + 5])
def test_exact_search_with_filters_equals_brute_force(limits, k):
  labels, queries = integers(NUM_LABELS, 0), integers(NUM_QUERIES, 1)
  live = np.random.default_rng(3).random(NUM_LABELS) > 0.2
  allow, deny = _random_rows(k)
  index = ExactIndex(labels, mesh_of_two(), rows=np.flatnonzero(live), block=16, query_chunk=16)
  scores, ids = search_filtered(index, labels, live, queries, k, _filters(allow, deny))
  expected_scores, expected_ids = brute_force(labels, queries, k, _permitted(live, allow, deny))
  np.testing.assert_array_equal(ids, expected_ids)
  np.testing.assert_array_equal(scores, expected_scores)


@needs_scann
@pytest.mark.parametrize("k", [K, NUM_LABELS + 5])
def test_scann_by_brute_force_with_filters_equals_brute_force(limits, k):
  labels, queries = normal(NUM_LABELS, 0), normal(NUM_QUERIES, 1)
  live = np.random.default_rng(3).random(NUM_LABELS) > 0.2
  allow, deny = _random_rows(k)
  index = ScannIndex(labels, rows=np.flatnonzero(live))
  _, ids = search_filtered(index, labels, live, queries, k, _filters(allow, deny))
  np.testing.assert_array_equal(ids, brute_force(labels, queries, k, _permitted(live, allow, deny))[1])


@needs_scann
def test_scann_that_searches_few_leaves_still_gives_k_labels_to_a_query_that_may_have_k(limits):
  labels, queries = normal(NUM_LABELS, 0), normal(NUM_QUERIES, 1)
  allow, deny = _random_rows(0)
  index = ScannIndex(labels, k=K, parameters=TREE)
  assert np.any(index.search(queries, NUM_LABELS)[1] < 0), "two leaves of twelve must not hold all labels"
  filters = _filters(allow, deny)
  scores, ids = search_filtered(index, labels, ALL_LIVE, queries, 30, filters)
  expected = brute_force(labels, queries, 30, _permitted(ALL_LIVE, allow, deny))[1]
  np.testing.assert_array_equal((ids >= 0).sum(axis=1), (expected >= 0).sum(axis=1))
  assert np.all(filters.permits(ids) == (ids >= 0))
  finite = np.where(ids >= 0, scores, -1e9)
  assert np.all(np.diff(finite, axis=1) <= 0)


def test_many_denied_labels_are_masked_and_few_are_overfetched(exact_index, searches, monkeypatch):
  monkeypatch.setattr(filters_module, "OVERFETCH_AT_MOST", 4)
  deny = IdSets.from_rows([[0], [0, 1, 2], range(5), None, range(100), range(100)])
  search_filtered(exact_index, integers(NUM_LABELS, 0), ALL_LIVE, integers(6, 1), 3, Filters(deny=deny))
  (overfetched, no_masks), (masked, (masks,)) = searches
  assert (overfetched, no_masks) == (3 + 4, ())
  assert masked == 3 and len(masks) == 3, "five, a hundred and a hundred denied labels: one pass, no wider than k"


def test_queries_that_share_a_category_take_one_pass_if_each_denies_few_labels(exact_index, searches, monkeypatch):
  monkeypatch.setattr(filters_module, "GATHER_AT_MOST", 0)
  labels, queries = integers(NUM_LABELS, 0), integers(NUM_QUERIES, 1)
  category = IdSets.from_ragged(Ragged.from_rows([range(0, NUM_LABELS, 2)]), np.zeros(NUM_QUERIES, np.int32))
  deny = IdSets.from_rows([[query] for query in range(NUM_QUERIES)])
  search_filtered(exact_index, labels, ALL_LIVE, queries, 3, Filters(category, deny))
  ((_, (masks,)),) = searches
  assert masks.shape == (1, NUM_LABELS)


def test_no_queries_give_no_rows(limits, exact_index):
  labels = integers(NUM_LABELS, 0)
  scores, ids = search_filtered(exact_index, labels, ALL_LIVE, labels[:0], 3, _filters([], []))
  assert scores.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("wrong", [NUM_LABELS, -1])
def test_ids_that_are_not_those_of_labels_are_named(exact_index, wrong):
  labels = integers(NUM_LABELS, 0)
  sets = IdSets(Ragged.from_rows([[3, wrong]]), np.zeros(1, np.int32))
  with pytest.raises(InputError, match=rf"deny.*no label {wrong}; ids are from 0 to {NUM_LABELS - 1}"):
    search_filtered(exact_index, labels, ALL_LIVE, labels[:1], 3, Filters(deny=sets))


def test_filters_for_another_number_of_queries_are_refused(exact_index):
  labels = integers(NUM_LABELS, 0)
  with pytest.raises(ValueError, match=r"2 queries but 1 filters \(allow\)"):
    search_filtered(exact_index, labels, ALL_LIVE, labels[:2], 3, Filters(IdSets.from_rows([[0]])))


def test_sets_are_sorted_and_distinct_and_shared_ones_are_stored_once():
  sets = IdSets.from_ragged(Ragged.from_rows([[5, 1, 5], [], [2]]), [2, 0, 0, -1, 1])
  assert [sets.sets[row].tolist() for row in range(3)] == [[1, 5], [], [2]]
  assert [row.tolist() for row in map(sets.rows().__getitem__, range(5))] == [[2], [1, 5], [1, 5], [], []]
  assert sets.sizes.tolist() == [1, 2, 2, 0, 0]
  taken = sets.take(np.asarray([3, 1, 2]))
  assert len(taken.sets) == 1 and taken.sizes.tolist() == [0, 2, 2]


def test_permitted_labels_equal_those_of_sets():
  allow, deny = _random_rows(1)
  ids = np.random.default_rng(0).integers(-1, NUM_LABELS, (NUM_QUERIES, 9))
  expected = np.take_along_axis(_permitted(ALL_LIVE, allow, deny), np.maximum(ids, 0), axis=1) & (ids >= 0)
  np.testing.assert_array_equal(_filters(allow, deny).permits(ids), expected)
