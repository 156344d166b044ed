"""Retrieval-augmented inference equals a dense transcription of its formula."""

import numpy as np
import pytest

from tests.helpers.retrieval_cases import NUM_LABELS, NUM_QUERIES, NUM_TRAIN, neighbors_of, random_case
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.retrieval_augmented import Neighbors, combine


@pytest.fixture(scope="module")
def case():
  return random_case()


@pytest.fixture(scope="module")
def neighbors(case):
  return neighbors_of(case, 10)


def _dense(case, *, hits, lambda_, temperature):
  """The formula on dense matrices: scores [Q, L], 0 for a label without mass."""
  has_label = np.zeros((NUM_TRAIN, NUM_LABELS))
  for row, labels in enumerate(case.train_labels):
    has_label[row, labels] = 1
  result = []
  for query in case.queries.astype(np.float64):
    cosines = [query @ part.astype(np.float64).T for part in (case.labels, case.train)]
    kept = [np.where(c >= np.sort(c)[-hits], c, -np.inf) for c in cosines]
    kept = np.concatenate(kept)
    mass = np.exp((kept - kept.max()) / temperature)
    mass /= mass.sum()
    result.append(lambda_ * mass[:NUM_LABELS] + (1 - lambda_) * mass[NUM_LABELS:] @ has_label)
  return np.asarray(result)


@pytest.mark.parametrize(("lambda_", "temperature"), [(0.9, 0.05), (0.3, 1.0), (0.0, 0.05), (1.0, 0.02), (0.5, 1e-3)])
@pytest.mark.parametrize("k", [5, 40])
def test_scores_equal_the_dense_formula(case, neighbors, lambda_, temperature, k):
  scores, ids = combine(
    neighbors, Ragged.from_rows(case.train_labels), num_labels=NUM_LABELS, lambda_=lambda_, temperature=temperature, k=k
  )
  expected = _dense(case, hits=10, lambda_=lambda_, temperature=temperature)
  # A rounding error of a score is multiplied by 1 / temperature in its exponent. Smaller masses are 0 in float32.
  close = dict(rtol=max(1e-4, 1e-6 / temperature), atol=1e-37)
  for query in range(NUM_QUERIES):
    found = ids[query][ids[query] >= 0]
    assert len(found) == min(k, (expected[query] > 0).sum())
    np.testing.assert_allclose(scores[query, : len(found)], expected[query, found], **close)
    np.testing.assert_allclose(scores[query, : len(found)], np.sort(expected[query])[::-1][: len(found)], **close)
    assert len(set(found)) == len(found)
    assert np.all(scores[query, len(found) :] == -np.inf)


def test_excluded_labels_leave_their_places_to_the_next(case, neighbors):
  rows = Ragged.from_rows(case.train_labels)
  setting = dict(num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1)
  _, ranked = combine(neighbors, rows, k=NUM_LABELS, **setting)
  best = [ranked[query, : len(row)].tolist() for query, row in enumerate(case.exclude)]
  _, ids = combine(neighbors, rows, k=6, exclude=Ragged.from_rows(best), **setting)
  for query in range(NUM_QUERIES):
    assert ids[query].tolist() == ranked[query, len(best[query]) : len(best[query]) + 6].tolist()


def test_every_label_of_a_neighbor_gets_all_of_its_mass_and_the_lower_id_wins_ties():
  neighbors = Neighbors(
    np.asarray([[-np.inf]], np.float32),
    np.asarray([[-1]], np.int32),
    np.asarray([[0.5, 0.5]], np.float32),
    np.asarray([[1, 0]], np.int32),
  )
  scores, ids = combine(neighbors, Ragged.from_rows([[7, 3, 5], [3]]), num_labels=9, lambda_=0.0, temperature=0.05, k=4)
  assert ids.tolist() == [[3, 5, 7, -1]]
  np.testing.assert_allclose(scores[0, :3], [1.0, 0.5, 0.5])


def test_a_query_without_neighbors_gets_no_label():
  nothing = np.full((1, 2), -np.inf, np.float32), np.full((1, 2), -1, np.int32)
  scores, ids = combine(
    Neighbors(*nothing, *nothing), Ragged.from_rows([[0]]), num_labels=3, lambda_=0.5, temperature=0.05, k=2
  )
  assert ids.tolist() == [[-1, -1]] and np.all(scores == -np.inf)


def test_blocks_of_queries_do_not_change_the_result(case, neighbors, monkeypatch):
  rows = Ragged.from_rows(case.train_labels)
  arguments = dict(num_labels=NUM_LABELS, lambda_=0.7, temperature=0.05, k=9, exclude=Ragged.from_rows(case.exclude))
  whole = combine(neighbors, rows, **arguments)
  monkeypatch.setattr(retrieval_augmented, "QUERIES_PER_BLOCK", 4)
  for actual, expected in zip(combine(neighbors, rows, **arguments), whole, strict=True):
    np.testing.assert_array_equal(actual, expected)


def test_an_excluded_training_query_is_not_found(case):
  case = case._replace(queries=case.train)
  itself = np.arange(NUM_TRAIN)
  assert np.all(neighbors_of(case, 5).query_ids[:, 0] == itself)
  found = neighbors_of(case, 5, exclude_queries=Ragged.from_rows(itself[:, None].tolist())).query_ids
  assert np.all(found >= 0) and not np.any(found == itself[:, None])


@pytest.mark.parametrize(
  ("lambda_", "temperature", "message"),
  [(1.5, 0.05, "lambda .* 1.5: it must be between 0 and 1"), (0.5, 0.0, "temperature .* 0.0: it must be above 0")],
)
def test_settings_out_of_range_are_named(case, neighbors, lambda_, temperature, message):
  rows = Ragged.from_rows(case.train_labels)
  with pytest.raises(InputError, match=message):
    combine(neighbors, rows, num_labels=NUM_LABELS, lambda_=lambda_, temperature=temperature, k=3)


def test_neighbors_without_labels_are_those_of_a_search_that_has_not_found_them():
  labels = np.array([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]], np.float32), np.array([[4, 2, 7], [1, 4, 0]], np.int32)
  queries = np.array([[0.3], [0.2]], np.float32), np.array([[5], [6]], np.int32)
  left = Neighbors(*labels, *queries).without(Ragged.from_rows([[2, 9], []]))
  np.testing.assert_array_equal(left.label_ids, [[4, 7, -1], [1, 4, 0]])
  np.testing.assert_array_equal(left.label_scores, np.array([[0.9, 0.7, -np.inf], [0.6, 0.5, 0.4]], np.float32))
  np.testing.assert_array_equal(left.query_ids, queries[1])
