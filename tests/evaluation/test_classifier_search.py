"""The row of classifiers alone, against a ranking of all labels by loops."""

import jax
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.evaluation.classifier_search import evaluate_classifiers
from vixml_jax.evaluation.evaluator import EvaluationConfig, EvaluationQueries
from vixml_jax.label_classifiers import SCALE
from vixml_jax.mining.rows import shard_rows
from vixml_jax.ragged import Ragged
from vixml_jax.sharded_rows import ShardedRows

NUM_LABELS, DIM, NUM_QUERIES = 40, 6, 25


@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_are_those_of_the_ranking_by_score_without_excluded_labels(devices):
  rng = np.random.default_rng(0)
  classifiers = rng.normal(size=(NUM_LABELS, DIM + 1)).astype(np.float32)
  classifiers[:, -1] *= 10  # Without the biases, the ranking would be another one.
  classifiers[0] = np.nan  # A label without a classifier is ranked last.
  embeddings = rng.normal(size=(NUM_QUERIES, DIM)).astype(np.float32)
  labels = [rng.choice(NUM_LABELS, 15, replace=False) for _ in range(NUM_QUERIES)]
  excluded = [rng.choice(NUM_LABELS, 2, replace=False) for _ in range(NUM_QUERIES)]
  correct, of_ten = [], []
  for query in range(NUM_QUERIES):
    scores = SCALE * classifiers[:, :-1] @ embeddings[query] + classifiers[:, -1]
    ranked = [label for label in np.argsort(-np.nan_to_num(scores, nan=-1e4)) if label not in excluded[query]]
    wanted = {*labels[query]} - {*excluded[query]}
    correct.append(ranked[0] in wanted)
    of_ten.append(len(wanted & {*ranked[:10]}))
  mesh = sharding.make_mesh(devices=jax.devices()[:devices])
  kept = Ragged.from_rows([[*({*own} - {*out})] for own, out in zip(labels, excluded, strict=True)])
  queries = EvaluationQueries(embeddings, kept, Ragged.from_rows(excluded))
  rows = ShardedRows(shard_rows(classifiers, mesh), NUM_LABELS)
  found = evaluate_classifiers(rows, queries, np.ones(NUM_LABELS), EvaluationConfig((1,), (10,), 0, None))
  assert found["P@1"] == pytest.approx(100 * np.mean(correct))
  shares = [hits / number for hits, number in zip(of_ten, kept.lengths, strict=True) if number]
  assert found["R@10"] == pytest.approx(100 * np.mean(shares))
  assert 0 < found["P@1"] < 100
