"""Ranking metrics against napkinxc and brute force."""

import napkinxc.metrics
import numpy as np
import pytest

from tests.helpers.random_rankings import KS, NUM_LABELS, random_rankings
from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.metrics import evaluate, metrics_by_frequency, query_metrics
from vixml_jax.ragged import Ragged


def _lists(ids):
  return [row[row >= 0].tolist() for row in ids]


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_equal_napkinxc(seed):
  ids, truth, frequencies = random_rankings(seed=seed)
  propensity = inverse_propensity(frequencies, 1000, 0.6, 2.6)
  ours = evaluate(ids, Ragged.from_rows(truth), propensity, **KS)
  predicted = _lists(ids)
  theirs = {
    "P": napkinxc.metrics.precision_at_k(truth, predicted, k=20),
    "nDCG": napkinxc.metrics.ndcg_at_k(truth, predicted, k=20),
    "R": napkinxc.metrics.recall_at_k(truth, predicted, k=20),
    "Hit": napkinxc.metrics.abandonment_at_k(truth, predicted, k=20),  # Counts hits, despite its name.
    "PSP": napkinxc.metrics.psprecision_at_k(truth, predicted, propensity, k=20),
    "PSnDCG": napkinxc.metrics.psndcg_at_k(truth, predicted, propensity, k=20),
  }
  compared = 0
  for name, values in theirs.items():
    for k in (1, 3, 5, 10, 20):
      if f"{name}@{k}" in ours:
        assert ours[f"{name}@{k}"] == pytest.approx(100 * values[k - 1], abs=1e-4), f"{name}@{k}"
        compared += 1
  assert compared == 4 * 3 + 2 + 5


def test_map_and_mrr_equal_brute_force():
  ids, truth, frequencies = random_rankings()
  ours = evaluate(ids, Ragged.from_rows(truth), inverse_propensity(frequencies, 1000, 0.55, 1.5), **KS)
  for k in (1, 3, 5, 10, 20):
    precisions, reciprocals = [], []
    for predicted, positives in zip(_lists(ids), truth, strict=True):
      ranks = [rank for rank, label in enumerate(predicted[:k], 1) if label in positives]
      precisions.append(sum(i / rank for i, rank in enumerate(ranks, 1)) / max(min(k, len(positives)), 1))
      reciprocals.append(1 / ranks[0] if ranks else 0)
    assert ours[f"MAP@{k}"] == pytest.approx(100 * np.mean(precisions), abs=1e-4)
    assert ours[f"MRR@{k}"] == pytest.approx(100 * np.mean(reciprocals), abs=1e-4)


def test_a_perfect_ranking_scores_100_and_the_best_psp_needs_rare_labels_first():
  truth = Ragged.from_rows([[3, 1, 2, 0, 4], [5]])
  propensity = np.asarray([1, 2, 3, 4, 5, 6.0])
  perfect = np.asarray([[4, 3, 2, 1, 0, -1], [5, 0, 1, 2, 3, 4]])
  scores = evaluate(perfect, truth, propensity, precision_ks=(1, 5), recall_ks=(5,))
  assert {name: round(scores[name], 3) for name in ("P@1", "P@5", "PSP@1", "PSP@5", "nDCG@5", "PSnDCG@5", "R@5")} == {
    "P@1": 100,
    "P@5": 60,
    "PSP@1": 100,
    "PSP@5": 100,
    "nDCG@5": 100,
    "PSnDCG@5": 100,
    "R@5": 100,
  }
  common_first = perfect.copy()
  common_first[0] = [0, 1, 2, 3, 4, -1]
  assert evaluate(common_first, truth, propensity, precision_ks=(1,), recall_ks=(5,))["PSP@1"] == pytest.approx(
    100 * (1 + 6) / (5 + 6)
  )


def test_a_repeated_positive_counts_once():
  ids, propensity = np.asarray([[2, 0, 1, 3, 4]]), np.ones(5)
  twice = evaluate(ids, Ragged.from_rows([[2, 1, 2]]), propensity, recall_ks=(5,))
  assert twice == evaluate(ids, Ragged.from_rows([[1, 2]]), propensity, recall_ks=(5,))


def test_blocks_of_queries_do_not_change_the_result(monkeypatch):
  ids, truth, frequencies = random_rankings()
  rows, propensity = Ragged.from_rows(truth), inverse_propensity(frequencies, 1000, 0.55, 1.5)
  whole, groups = (query_metrics(ids, rows, propensity, **KS), metrics_by_frequency(ids, rows, frequencies, **KS))
  monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 7)
  parts = query_metrics(ids, rows, propensity, **KS)
  np.testing.assert_array_equal(parts.numerators, whole.numerators)
  np.testing.assert_array_equal(parts.denominators, whole.denominators)
  assert metrics_by_frequency(ids, rows, frequencies, **KS) == groups


def test_too_few_predictions_are_refused():
  with pytest.raises(ValueError, match="ids has 20 predictions per query, too few for metrics at 100"):
    evaluate(random_rankings()[0], Ragged.from_rows(random_rankings()[1]), np.ones(NUM_LABELS))


def test_metrics_by_frequency_equal_brute_force():
  ids, truth, frequencies = random_rankings()
  groups = metrics_by_frequency(ids, Ragged.from_rows(truth), frequencies, **KS)
  by_rarity = sorted(range(NUM_LABELS), key=lambda label: (frequencies[label], label))
  for number, group in enumerate(groups):
    labels = set(by_rarity[6 * number : 6 * number + 6])
    pairs = [(query, label) for query, row in enumerate(truth) for label in row if label in labels]
    assert group["positives"] == len(pairs)
    for k in (10, 20):
      found = sum(label in ids[query, :k] for query, label in pairs)
      assert group[f"R@{k}"] == pytest.approx(100 * found / len(pairs))
    hits = sum(label in truth[query] for query in range(200) for label in ids[query, :5] if label in labels)
    assert group["P@5"] == pytest.approx(100 * hits / (5 * 200))
  assert [group["decile"] for group in groups] == list(range(1, 11))
  whole = evaluate(ids, Ragged.from_rows(truth), np.ones(NUM_LABELS), **KS)
  for k in (1, 3, 5):
    assert sum(group[f"P@{k}"] for group in groups) == pytest.approx(whole[f"P@{k}"])


def test_a_decile_without_test_pairs_has_no_recall():
  groups = metrics_by_frequency(
    np.asarray([[19, 0]]), Ragged.from_rows([[19]]), np.arange(20), precision_ks=(1,), recall_ks=(2,)
  )
  assert groups[0]["R@2"] is None and groups[9]["R@2"] == 100


def test_without_any_positive_all_metrics_are_0():
  nothing = Ragged.from_rows([[], []])
  for ids in (np.array([[0, 1, 2], [2, 1, -1]]), np.full((2, 3), -1)):
    found = evaluate(ids, nothing, np.ones(3), precision_ks=(1, 3), recall_ks=(2,))
    assert set(found.values()) == {0.0}
  rows = metrics_by_frequency(ids, nothing, np.arange(3), precision_ks=(1,), recall_ks=(2,))
  assert [row["P@1"] for row in rows] == [0.0] * 3 and [row["R@2"] for row in rows] == [None] * 3


def test_queries_without_positives_count_as_0_in_means_and_not_in_ratios_of_sums():
  ids, propensity = np.array([[0, 1], [0, 1]]), np.array([5.0, 2.0])
  alone = evaluate(ids[:1], Ragged.from_rows([[0]]), propensity, precision_ks=(1,), recall_ks=(2,))
  both = evaluate(ids, Ragged.from_rows([[0], []]), propensity, precision_ks=(1,), recall_ks=(2,))
  assert alone["P@1"] == 100 and both["P@1"] == 50 and both["R@2"] == 50
  assert alone["PSP@1"] == both["PSP@1"] == 100
