"""Choice of lambda and temperature: all settings are tried, and recall decides between nearly equal ones."""

import numpy as np
import pytest

from tests.helpers.retrieval_cases import NUM_LABELS, neighbors_of, random_case
from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.evaluation.tuning import Setting, choose, pick
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import combine


@pytest.fixture(scope="module")
def case():
  return random_case()


@pytest.fixture(scope="module")
def neighbors(case):
  return neighbors_of(case, 10)


@pytest.mark.parametrize("metric", ["P@1", "nDCG@5"])
def test_all_settings_are_tried_and_one_is_picked(case, neighbors, metric):
  train_labels, truth, exclude = (Ragged.from_rows(rows) for rows in (case.train_labels, case.truth, case.exclude))
  propensity = np.linspace(1, 5, NUM_LABELS)
  lambdas, temperatures = (0.0, 0.5, 1.0), (0.02, 0.2)
  best, settings = choose(
    neighbors,
    train_labels,
    truth,
    propensity,
    lambdas=lambdas,
    temperatures=temperatures,
    metric=metric,
    exclude=exclude,
  )
  assert {(s.lambda_, s.temperature) for s in settings} == {(a, b) for a in lambdas for b in temperatures}
  for setting in settings:
    _, ids = combine(
      neighbors,
      train_labels,
      num_labels=NUM_LABELS,
      lambda_=setting.lambda_,
      temperature=setting.temperature,
      k=100,
      exclude=exclude,
    )
    expected = evaluate(ids, truth, propensity)
    assert setting.metrics == {name: expected[name] for name in ("P@1", "PSP@1", "R@100", metric)}
  assert best is pick(settings, metric, len(truth))


def test_among_settings_within_a_standard_error_of_the_best_the_one_with_the_highest_recall_is_picked():
  def setting(precision, recall):
    return Setting(0.5, 0.1, {"P@1": precision, "R@100": recall})

  # Half of 100 queries are right: one standard error is 5 points.
  best, near, far, equal = setting(50, 70), setting(45.5, 80), setting(44.5, 90), setting(46, 80)
  assert pick([best, near, far, equal], "P@1", 100) is near
  assert pick([best, near, far, equal], "P@1", 10_000) is best
  # With all or none right, the error is 0.
  assert pick([setting(100, 1), setting(99, 2)], "P@1", 100).metrics["P@1"] == 100
  assert pick([setting(0, 1), setting(0, 2)], "P@1", 100).metrics["R@100"] == 2


def test_an_unknown_metric_to_choose_by_is_named(case, neighbors):
  train_labels, truth = Ragged.from_rows(case.train_labels), Ragged.from_rows(case.truth)
  with pytest.raises(InputError, match=r"'F1' .* is not one of"):
    choose(neighbors, train_labels, truth, np.ones(NUM_LABELS), metric="F1")
