"""Evaluation of embeddings on the devices: equal to one device and to the host, and no device has all of them."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.search_cases import brute_force, integers
from tests.helpers.sharded import from_host
from tests.helpers.share_guard import ShareGuard, Violation
from vixml_jax.evaluation import evaluator
from vixml_jax.evaluation.evaluator import (
  EvaluationConfig,
  EvaluationIndex,
  EvaluationQueries,
  choose_retrieval,
  evaluate,
)
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import RetrievalSettings
from vixml_jax.sharding import make_mesh, padded_rows

NUM_LABELS, NUM_TRAIN, NUM_QUERIES, DIM = 1300, 2100, 150, 16
CONFIG = EvaluationConfig(
  ks=(1, 3, 5), recall_ks=(10, 50), bootstrap_samples=10, retrieval=RetrievalSettings(0.5, 0.1, hits=20, query_hits=8)
)


def _rows(rng, count, most):
  return Ragged.from_rows([np.sort(rng.choice(NUM_LABELS, rng.integers(0, most), replace=False)) for _ in range(count)])


@dataclasses.dataclass(frozen=True)
class Case:
  """Embeddings on the host and the labels of training queries and queries."""

  labels: np.ndarray
  train: np.ndarray
  queries: np.ndarray
  train_labels: Ragged
  truth: Ragged
  filter: Ragged

  def placed(self, place, known=None):
    """The index and the queries, with embeddings that `place` has put somewhere."""
    train_labels = self.train_labels if known is None else self.train_labels.keep(known)
    index = EvaluationIndex(
      place(self.labels),
      place(self.train),
      train_labels,
      np.linspace(1, 5, NUM_LABELS),
      "exact",
      make_mesh(8, 1, 1),
      known=known,
    )
    return index, EvaluationQueries(place(self.queries), self.truth, self.filter)


@pytest.fixture(scope="module")
def case():
  """Whole numbers over 16, whose inner products are exact; some queries are near their labels."""
  rng = np.random.default_rng(0)
  labels, truth = integers(NUM_LABELS, 1, DIM), _rows(rng, NUM_QUERIES, 6)
  queries = integers(NUM_QUERIES, 2, DIM)
  for query in np.flatnonzero(truth.lengths)[::2]:
    queries[query] = labels[truth[query][0]]
  train = integers(NUM_TRAIN, 3, DIM)
  return Case(labels / 16, train / 16, queries / 16, _rows(rng, NUM_TRAIN, 5), truth, _rows(rng, NUM_QUERIES, 4))


def _sharded(*shape, devices=None):
  mesh = make_mesh(*shape, devices=devices)
  return lambda host: from_host(host, mesh)


def _assert_equal(result, expected):
  assert result.plain == expected.plain and result.augmented == expected.augmented
  assert result.intervals == expected.intervals and result.deciles == expected.deciles
  assert result.scann_recall == expected.scann_recall
  np.testing.assert_array_equal(result.examples, expected.examples)
  for row in expected.ids:
    np.testing.assert_array_equal(result.ids[row], expected.ids[row])
    np.testing.assert_array_equal(result.scores[row], expected.scores[row])
    np.testing.assert_array_equal(result.per_query[row].numerators, expected.per_query[row].numerators)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_results_do_not_depend_on_the_devices_or_on_the_size_of_blocks(case, shape, joint, monkeypatch):
  config = dataclasses.replace(CONFIG, retrieval=dataclasses.replace(CONFIG.retrieval, joint=joint))
  expected = evaluate(*case.placed(np.asarray), config)
  assert 5 < expected.plain["P@1"] < 95 and expected.augmented != expected.plain
  _assert_equal(evaluate(*case.placed(_sharded(1, 1, 1, devices=jax.devices()[:1])), config), expected)
  monkeypatch.setattr(evaluator, "QUERIES_PER_BLOCK", 32)
  _assert_equal(evaluate(*case.placed(_sharded(*shape)), config), expected)


def test_the_metrics_are_those_of_a_brute_force_ranking(case):
  result = evaluate(*case.placed(_sharded(8, 1, 1)), CONFIG, np.arange(NUM_QUERIES))
  permitted = np.ones((NUM_QUERIES, NUM_LABELS), bool)
  permitted[case.filter.row_ids(), case.filter.values] = False
  scores, ids = brute_force(case.labels, case.queries, CONFIG.depth, permitted)
  np.testing.assert_array_equal(result.scores["plain"], scores)
  np.testing.assert_array_equal(result.ids["plain"], ids)
  hits = [np.isin(row, case.truth[query]) for query, row in enumerate(ids)]
  assert result.plain["P@1"] == pytest.approx(100 * np.mean([hit[0] for hit in hits]))
  recalls = [hit[:10].sum() / max(len(case.truth[query]), 1) for query, hit in enumerate(hits)]
  assert result.plain["R@10"] == pytest.approx(100 * np.mean(recalls))


def test_rankings_are_kept_of_the_examples_only(case):
  index, queries = case.placed(_sharded(8, 1, 1))
  every = evaluate(index, queries, CONFIG, np.arange(NUM_QUERIES))
  few = evaluate(index, queries, CONFIG, np.array([3, 70, 149]))
  none = evaluate(index, queries, CONFIG, np.zeros(0, np.int64))
  for row in ("plain", "augmented"):
    np.testing.assert_array_equal(few.ids[row], every.ids[row][[3, 70, 149]])
    np.testing.assert_array_equal(few.scores[row], every.scores[row][[3, 70, 149]])
    assert none.ids[row].shape == (0, CONFIG.depth)
  assert few.plain == none.plain == every.plain


def test_training_queries_that_are_not_known_are_as_if_they_did_not_exist(case):
  known = np.random.default_rng(1).random(NUM_TRAIN) < 0.7
  index, queries = case.placed(_sharded(8, 1, 1), known)
  rest = Case(
    case.labels, case.train[known], case.queries, case.train_labels.take(np.flatnonzero(known)), case.truth, case.filter
  )
  _assert_equal(evaluate(index, queries, CONFIG), evaluate(*rest.placed(np.asarray), CONFIG))
  chosen, tried = choose_retrieval(index, queries, CONFIG.retrieval)
  expected, expected_tried = choose_retrieval(*rest.placed(np.asarray), CONFIG.retrieval)
  assert chosen == expected and tried == expected_tried
  assert evaluate(index, queries, CONFIG) != evaluate(*case.placed(np.asarray), CONFIG)


def test_lambda_and_temperature_are_chosen_from_blocks_as_from_all_queries(case, monkeypatch):
  whole = choose_retrieval(*case.placed(np.asarray), CONFIG.retrieval)
  monkeypatch.setattr(evaluator, "QUERIES_PER_BLOCK", 32)
  assert choose_retrieval(*case.placed(_sharded(8, 1, 1)), CONFIG.retrieval) == whole


def test_no_device_and_no_host_array_holds_more_than_a_share(case, monkeypatch):
  index, queries = case.placed(_sharded(8, 1, 1))
  monkeypatch.setattr(evaluator, "QUERIES_PER_BLOCK", 64)
  monkeypatch.setattr(evaluator, "_SCANN_BYTES", 0)
  share = padded_rows(NUM_TRAIN) // 8
  guard = ShareGuard(DIM, share)
  with monkeypatch.context() as patch:
    guard.install(patch.setattr)
    evaluate(index, queries, CONFIG)
    choose_retrieval(index, queries, CONFIG.retrieval)
  assert guard.copies > 0 and guard.arrays > 0
  with monkeypatch.context() as patch:
    ShareGuard(DIM, 100).install(patch.setattr)
    with pytest.raises(Violation, match="a device holds"):
      evaluate(index, queries, CONFIG)


def test_scann_is_not_compared_where_it_would_need_too_much_memory(case, monkeypatch, caplog):
  monkeypatch.setattr(evaluator, "scann_available", lambda: (True, ""))
  monkeypatch.setattr(evaluator, "_SCANN_BYTES", NUM_LABELS * DIM * 4 - 1)
  with caplog.at_level("INFO"):
    assert evaluate(*case.placed(_sharded(8, 1, 1)), CONFIG).scann_recall == {}
  assert "vixml_jax.evaluate --search=scann" in caplog.text
