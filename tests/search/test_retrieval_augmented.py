"""Retrieval-augmented inference equals a dense transcription of its formula."""

import jax
from jax.sharding import Mesh
import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.ragged import Ragged
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.retrieval_augmented import Neighbors, Setting, choose, combine, pick, search_both

NUM_LABELS, NUM_TRAIN, NUM_QUERIES = 40, 70, 25


def _unit(rows, rng):
  points = rng.normal(size=(rows, 6))
  return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def _case(seed=0):
  rng = np.random.default_rng(seed)
  labels, train, queries = (_unit(rows, rng) for rows in (NUM_LABELS, NUM_TRAIN, NUM_QUERIES))
  draw = lambda rows, least, most: [
    np.sort(rng.choice(NUM_LABELS, rng.integers(least, most), replace=False)).tolist() for _ in range(rows)
  ]
  return (labels, train, queries, draw(NUM_TRAIN, 0, 6), draw(NUM_QUERIES, 1, 8), draw(NUM_QUERIES, 0, 4))


def _mesh():
  return Mesh(np.asarray(jax.devices()[:2]), ("data",))


def _search(labels, train, queries, hits, **exclude):
  return search_both(
    ExactIndex(labels, _mesh()), ExactIndex(train, _mesh()), queries, label_hits=hits, query_hits=hits, **exclude
  )


def _dense(labels, train, queries, train_labels, *, hits, lambda_, temperature):
  """The formula on dense matrices: [Q, L] scores, 0 for a label without mass."""
  has = np.zeros((NUM_TRAIN, NUM_LABELS))
  for row, row_labels in enumerate(train_labels):
    has[row, row_labels] = 1
  result = []
  for query in queries.astype(np.float64):
    cosines = [query @ memory.astype(np.float64).T for memory in (labels, train)]
    kept = [np.where(c >= np.sort(c)[-hits:][0], c, -np.inf) for c in cosines]
    mass = np.exp(np.concatenate(kept) / temperature)
    mass /= mass.sum()
    result.append(lambda_ * mass[:NUM_LABELS] + (1 - lambda_) * mass[NUM_LABELS:] @ has)
  return np.asarray(result)


@pytest.mark.parametrize(("lambda_", "temperature"), [(0.9, 0.05), (0.3, 1.0), (0.0, 0.05), (1.0, 0.02)])
@pytest.mark.parametrize("k", [5, 40])
def test_combine_equals_the_dense_formula(lambda_, temperature, k):
  labels, train, queries, train_labels, _, _ = _case()
  neighbors = _search(labels, train, queries, 10)
  scores, ids = combine(
    neighbors, Ragged.from_rows(train_labels), num_labels=NUM_LABELS, lambda_=lambda_, temperature=temperature, k=k
  )
  expected = _dense(labels, train, queries, train_labels, hits=10, lambda_=lambda_, temperature=temperature)
  for query in range(NUM_QUERIES):
    found = ids[query][ids[query] >= 0]
    assert len(found) == min(k, (expected[query] > 0).sum())
    np.testing.assert_allclose(scores[query, : len(found)], expected[query, found], rtol=1e-4)
    np.testing.assert_allclose(scores[query, : len(found)], np.sort(expected[query])[::-1][: len(found)], rtol=1e-4)
    assert len(set(found)) == len(found)
    assert np.all(scores[query, len(found) :] == -np.inf)


def test_excluded_labels_leave_their_places_to_the_next():
  labels, train, queries, train_labels, _, exclude = _case()
  neighbors, rows = _search(labels, train, queries, 10), Ragged.from_rows(train_labels)
  setting = dict(num_labels=NUM_LABELS, lambda_=0.5, temperature=0.1)
  _, every = combine(neighbors, rows, k=NUM_LABELS, **setting)
  best = [every[query, :n].tolist() for query, n in enumerate(len(row) for row in exclude)]
  _, ids = combine(neighbors, rows, k=6, exclude=Ragged.from_rows(best), **setting)
  for query in range(NUM_QUERIES):
    assert ids[query].tolist() == every[query, len(best[query]) : len(best[query]) + 6].tolist()


def test_every_label_of_a_neighbor_gets_all_of_its_mass_and_ties_go_to_the_lower_id():
  neighbors = Neighbors(
    np.asarray([[-np.inf]], np.float32),
    np.asarray([[-1]], np.int32),
    np.asarray([[0.5, 0.5]], np.float32),
    np.asarray([[1, 0]], np.int32),
  )
  scores, ids = combine(neighbors, Ragged.from_rows([[7, 3, 5], [3]]), num_labels=9, lambda_=0.0, temperature=0.05, k=4)
  assert ids.tolist() == [[3, 5, 7, -1]]
  np.testing.assert_allclose(scores[0, :3], [1.0, 0.5, 0.5])


def test_a_query_without_any_neighbor_gets_no_label():
  nothing = np.full((1, 2), -np.inf, np.float32), np.full((1, 2), -1, np.int32)
  scores, ids = combine(
    Neighbors(*nothing, *nothing), Ragged.from_rows([[0]]), num_labels=3, lambda_=0.5, temperature=0.05, k=2
  )
  assert ids.tolist() == [[-1, -1]] and np.all(scores == -np.inf)


def test_chunks_do_not_change_the_result(monkeypatch):
  labels, train, queries, train_labels, _, exclude = _case()
  arguments = dict(num_labels=NUM_LABELS, lambda_=0.7, temperature=0.05, k=9, exclude=Ragged.from_rows(exclude))
  neighbors, rows = _search(labels, train, queries, 10), Ragged.from_rows(train_labels)
  whole = combine(neighbors, rows, **arguments)
  monkeypatch.setattr(retrieval_augmented, "_QUERIES_AT_ONCE", 4)
  for part, expected in zip(combine(neighbors, rows, **arguments), whole, strict=True):
    np.testing.assert_array_equal(part, expected)


def test_a_training_query_does_not_find_itself_when_told_so():
  labels, train, *_ = _case()
  itself = Ragged.from_rows([[row] for row in range(NUM_TRAIN)])
  assert np.all(_search(labels, train, train, 5).query_ids[:, 0] == np.arange(NUM_TRAIN))
  found = _search(labels, train, train, 5, exclude_queries=itself).query_ids
  assert np.all(found >= 0) and not np.any(found == np.arange(NUM_TRAIN)[:, None])


@pytest.mark.parametrize("metric", ["P@1", "R@100", "nDCG@5"])
def test_choose_tries_all_settings_and_picks_one(metric):
  labels, train, queries, train_labels, truth, exclude = _case()
  neighbors, rows, truth = (
    _search(labels, train, queries, 10),
    Ragged.from_rows(train_labels),
    Ragged.from_rows(truth),
  )
  propensity = np.linspace(1, 5, NUM_LABELS)
  lambdas, temperatures = (0.0, 0.5, 1.0), (0.02, 0.2)
  best, settings = choose(
    neighbors,
    rows,
    truth,
    propensity,
    lambdas=lambdas,
    temperatures=temperatures,
    metric=metric,
    exclude=Ragged.from_rows(exclude),
  )
  assert {(s.lambda_, s.temperature) for s in settings} == {(a, b) for a in lambdas for b in temperatures}
  for setting in settings:
    _, ids = combine(
      neighbors,
      rows,
      num_labels=NUM_LABELS,
      lambda_=setting.lambda_,
      temperature=setting.temperature,
      k=100,
      exclude=Ragged.from_rows(exclude),
    )
    expected = evaluate(ids, truth, propensity)
    assert setting.metrics == {name: expected[name] for name in ("P@1", "PSP@1", "R@100", metric)}
  assert best is pick(settings, metric, len(truth))


def test_of_settings_within_a_standard_error_of_the_best_the_one_with_most_recall_is_picked():
  def setting(precision, recall):
    return Setting(0.5, 0.1, {"P@1": precision, "R@100": recall})

  # Of 100 queries half are right: one standard error is 5 points.
  best, near, far, equal = setting(50, 70), setting(45.5, 80), setting(44.5, 90), setting(46, 80)
  assert pick([best, near, far, equal], "P@1", 100) is near
  assert pick([best, near, far, equal], "P@1", 10_000) is best
  # All right, or none: no error.
  assert pick([setting(100, 1), setting(99, 2)], "P@1", 100).metrics["P@1"] == 100
  assert pick([setting(0, 1), setting(0, 2)], "P@1", 100).metrics["R@100"] == 2


@pytest.mark.parametrize(
  ("setting", "message"),
  [((1.5, 0.05), "lambda .* 1.5: it must lie between 0 and 1"), ((0.5, 0.0), "temperature .* 0.0: it must be above 0")],
)
def test_settings_out_of_range_are_named(setting, message):
  labels, train, queries, train_labels, *_ = _case()
  with pytest.raises(InputError, match=message):
    combine(
      _search(labels, train, queries, 3),
      Ragged.from_rows(train_labels),
      num_labels=NUM_LABELS,
      lambda_=setting[0],
      temperature=setting[1],
      k=3,
    )


def test_an_unknown_metric_to_choose_by_is_named():
  labels, train, queries, train_labels, truth, _ = _case()
  with pytest.raises(InputError, match=r"'F1' .* is not one of"):
    choose(
      _search(labels, train, queries, 3),
      Ragged.from_rows(train_labels),
      Ragged.from_rows(truth),
      np.ones(NUM_LABELS),
      metric="F1",
    )
