"""Joint and split retrieval: which labels and training queries are a query's neighbors, against brute force."""

import numpy as np
import pytest

from tests.helpers.retrieval_cases import NUM_LABELS, NUM_QUERIES, NUM_TRAIN, neighbors_of, random_case
from tests.helpers.search_cases import mesh_of_two
from vixml_jax.ragged import Ragged
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.retrieval_augmented import Neighbors, RetrievalSettings, combine, search_both


@pytest.fixture(scope="module")
def case():
  return random_case()


def _brute_force(case, kept, lambda_, temperature):
  """Scores [Q, L] from the neighbors kept, bool [Q, labels and training queries]; 0 for a label without mass."""
  has_label = np.zeros((NUM_TRAIN, NUM_LABELS))
  for row, labels in enumerate(case.train_labels):
    has_label[row, labels] = 1
  cosines = case.queries.astype(np.float64) @ np.concatenate([case.labels, case.train]).astype(np.float64).T
  mass = np.where(kept, np.exp(cosines / temperature), 0)
  mass /= mass.sum(axis=1, keepdims=True)
  return lambda_ * mass[:, :NUM_LABELS] + (1 - lambda_) * mass[:, NUM_LABELS:] @ has_label


def _best(cosines, hits):
  """Which of the cosines are among the `hits` greatest of their row."""
  return cosines >= np.sort(cosines, axis=1)[:, [-hits]]


def _check_ranking(scores, ids, expected):
  for query in range(NUM_QUERIES):
    found = ids[query][ids[query] >= 0]
    assert len(found) == min(ids.shape[1], (expected[query] > 0).sum())
    np.testing.assert_allclose(scores[query, : len(found)], np.sort(expected[query])[::-1][: len(found)], rtol=1e-4)
    np.testing.assert_allclose(scores[query, : len(found)], expected[query, found], rtol=1e-4)


@pytest.mark.parametrize("hits", [1, 10, 60, NUM_LABELS + NUM_TRAIN])
def test_joint_retrieval_uses_the_nearest_of_labels_and_training_queries_together(case, hits):
  setting = dict(lambda_=0.3, temperature=0.1)
  neighbors = neighbors_of(case, hits).nearest(hits)
  scores, ids = combine(neighbors, Ragged.from_rows(case.train_labels), num_labels=NUM_LABELS, k=30, **setting)
  cosines = case.queries.astype(np.float64) @ np.concatenate([case.labels, case.train]).astype(np.float64).T
  _check_ranking(scores, ids, _brute_force(case, _best(cosines, hits), **setting))


@pytest.mark.parametrize(("hits", "query_hits"), [(20, 5), (5, 20)])
def test_split_retrieval_uses_a_number_of_labels_and_one_of_training_queries(case, hits, query_hits):
  setting = dict(lambda_=0.3, temperature=0.1)
  labels, train = (ExactIndex(part, mesh_of_two()) for part in (case.labels, case.train))
  neighbors = search_both(labels, train, case.queries, label_hits=hits, query_hits=query_hits)
  scores, ids = combine(neighbors, Ragged.from_rows(case.train_labels), num_labels=NUM_LABELS, k=30, **setting)
  parts = [case.queries.astype(np.float64) @ part.astype(np.float64).T for part in (case.labels, case.train)]
  kept = np.concatenate([_best(part, number) for part, number in zip(parts, (hits, query_hits), strict=True)], axis=1)
  _check_ranking(scores, ids, _brute_force(case, kept, **setting))


def test_labels_come_first_among_equal_scores_and_empty_places_stay_empty():
  neighbors = Neighbors(
    np.asarray([[0.9, 0.5, -np.inf]], np.float32),
    np.asarray([[4, 2, -1]], np.int32),
    np.asarray([[0.7, 0.5, 0.1]], np.float32),
    np.asarray([[8, 6, 7]], np.int32),
  )
  kept = neighbors.nearest(3)
  assert kept.label_ids.tolist() == [[4, 2, -1]] and kept.query_ids.tolist() == [[8, -1, -1]]
  np.testing.assert_array_equal(kept.label_scores, neighbors.label_scores)
  np.testing.assert_array_equal(kept.query_scores, np.float32([[0.7, -np.inf, -np.inf]]))
  everything = neighbors.nearest(100)
  assert everything.label_ids.tolist() == [[4, 2, -1]] and everything.query_ids.tolist() == [[8, 6, 7]]


def test_settings_of_an_index_are_read_back_and_those_of_an_older_index_are_separate():
  for settings in (RetrievalSettings(0.9, 0.05, 500, 50), RetrievalSettings(0.8, 0.1, 500, joint=True)):
    read = RetrievalSettings.from_json(settings.as_json())
    assert (read.lambda_, read.temperature, read.hits) == (settings.lambda_, settings.temperature, settings.hits)
    assert read.joint == settings.joint and read.num_query_hits == settings.num_query_hits
  older = RetrievalSettings.from_json({"lambda": 0.7, "temperature": 0.05, "hits": 100})
  assert not older.joint and older.hits == older.num_query_hits == 100
