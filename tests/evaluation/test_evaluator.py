"""Evaluation of embedded queries: plain and augmented rows, excluded labels, groups of queries."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.retrieval_cases import NUM_LABELS, NUM_QUERIES, random_case
from tests.helpers.search_cases import mesh_of_two
from vixml_jax.evaluation.evaluator import (
  EvaluationConfig,
  EvaluationIndex,
  EvaluationQueries,
  evaluate,
  example_queries,
)
from vixml_jax.evaluation.metrics import evaluate as metrics_of_rankings
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import RetrievalSettings

CONFIG = EvaluationConfig(
  ks=(1, 3), recall_ks=(10,), bootstrap_samples=20, retrieval=RetrievalSettings(lambda_=0.5, temperature=0.1, hits=20)
)
PROPENSITY = np.linspace(1, 5, NUM_LABELS)


@pytest.fixture(scope="module")
def case():
  """Random vectors and labels."""
  return random_case()


@pytest.fixture(scope="module")
def searched(case):
  """The labels and training queries of the case, and its queries."""
  index = EvaluationIndex(
    case.labels, case.train, Ragged.from_rows(case.train_labels), PROPENSITY, "exact", mesh_of_two()
  )
  return index, EvaluationQueries(case.queries, Ragged.from_rows(case.truth), Ragged.from_rows(case.exclude))


@pytest.fixture(scope="module")
def result(searched):
  """The evaluation of the case."""
  return evaluate(*searched, CONFIG, np.arange(NUM_QUERIES))


def test_the_plain_row_has_the_metrics_of_the_ranking_by_scores(case, result):
  scores = case.queries @ case.labels.T
  for query, excluded in enumerate(case.exclude):
    scores[query, excluded] = -np.inf
  ids = np.argsort(-scores, axis=1)[:, : CONFIG.depth]
  np.testing.assert_array_equal(result.ids["plain"], ids)
  truth = Ragged.from_rows(case.truth)
  assert result.plain == metrics_of_rankings(ids, truth, PROPENSITY, precision_ks=CONFIG.ks, recall_ks=CONFIG.recall_ks)


def test_both_rows_have_intervals_deciles_and_the_same_metrics(result):
  assert result.plain.keys() == result.augmented.keys() and result.plain != result.augmented
  for row, metrics in (("plain", result.plain), ("augmented", result.augmented)):
    assert result.ids[row].shape == result.scores[row].shape == (NUM_QUERIES, CONFIG.depth)
    assert result.per_query[row].mean() == metrics
    for name, (low, high) in result.intervals[row].items():
      assert 0 <= low <= high <= 100, name
    assert sum(group["P@1"] for group in result.deciles[row]) == pytest.approx(metrics["P@1"])


def test_without_retrieval_there_is_one_row_and_without_samples_there_are_no_intervals(searched, result):
  plain = evaluate(*searched, dataclasses.replace(CONFIG, retrieval=None, bootstrap_samples=0))
  assert plain.plain == result.plain and plain.augmented == {} and plain.intervals == {"plain": {}}
  assert plain.ids.keys() == plain.deciles.keys() == {"plain"}


def test_final_metrics_prefix_the_augmented_row(result):
  final = result.final_metrics()
  assert {name: final[name] for name in result.plain} == result.plain
  assert {name: final[f"RA/{name}"] for name in result.augmented} == result.augmented


def test_means_over_all_queries_are_weighted_means_over_groups(result):
  first, second = np.arange(10), np.arange(10, NUM_QUERIES)
  groups = [result.of_queries(rows, 0) for rows in (first, second)]
  assert [group["queries"] for group in groups] == [10, NUM_QUERIES - 10]
  for name in ("P@1", "R@10", "RA/P@1"):
    total = sum(group["queries"] * group["metrics"][name] for group in groups)
    assert total / NUM_QUERIES == pytest.approx(result.final_metrics()[name])


def test_rankings_are_kept_for_a_few_random_queries_with_labels_only(searched, result):
  labels = Ragged.from_rows([[row] if row % 3 else [] for row in range(60)])
  chosen = example_queries(labels, 7)
  assert len(chosen) == len(set(chosen)) == 7 and all(chosen % 3) and sorted(chosen) == chosen.tolist()
  np.testing.assert_array_equal(chosen, example_queries(labels, 7))
  some = evaluate(*searched, CONFIG, np.array([3, 11]))
  for row in ("plain", "augmented"):
    np.testing.assert_array_equal(some.ids[row], result.ids[row][[3, 11]])
  assert some.plain == result.plain and some.deciles == result.deciles
