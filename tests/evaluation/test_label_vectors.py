"""Vectors of labels with a share of classifiers: by loops, on any number of devices, chosen on held-out queries."""

import jax
import numpy as np
import pytest

from tests.helpers.miniature_runs import miniature_config
import vixml_jax
from vixml_jax import sharding
from vixml_jax.evaluation import label_vectors
from vixml_jax.evaluation.evaluator import EvaluationQueries
from vixml_jax.experiment import train_and_evaluate
from vixml_jax.label_classifiers import SCALE
from vixml_jax.mining.rows import shard_rows
from vixml_jax.ragged import Ragged
from vixml_jax.search import snapshots
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.sharded_rows import ShardedRows

NUM_LABELS, DIM, NUM_QUERIES = 37, 16, 300
WITHOUT = 5  # A label without a classifier.


def unit(rows, seed):
  vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_on(count, values):
  mesh = sharding.make_mesh(fsdp=2 if count > 1 else 1, devices=jax.devices()[:count])
  return ShardedRows(shard_rows(values, mesh), len(values))


@pytest.fixture(scope="module")
def task():
  """Queries whose label the prototypes know roughly, and the classifiers well."""
  centers = unit(NUM_LABELS, 1)
  labels = np.random.default_rng(2).integers(0, NUM_LABELS, NUM_QUERIES)
  queries = centers[labels] + 0.9 * unit(NUM_QUERIES, 3)
  queries /= np.linalg.norm(queries, axis=1, keepdims=True)
  prototypes = centers + 1.2 * unit(NUM_LABELS, 4)
  prototypes /= np.linalg.norm(prototypes, axis=1, keepdims=True)
  classifiers = np.concatenate([centers, np.full((NUM_LABELS, 1), 3)], axis=1).astype(np.float32)
  held_out = EvaluationQueries(
    queries, Ragged.from_rows(labels[:, None].tolist()), Ragged.from_rows([[]] * NUM_QUERIES)
  )
  return prototypes.astype(np.float32), classifiers, held_out


@pytest.mark.parametrize("devices", [1, 8])
def test_the_score_is_the_sum_of_both_or_that_of_an_average_label(task, devices):
  prototypes, classifiers, held_out = task
  classifiers = classifiers.copy()
  classifiers[WITHOUT] = np.nan
  hidden = np.arange(NUM_LABELS) == 7
  offset = unit(1, 8)[0]
  mix = label_vectors.ClassifierMix(0.05, 12.0, offset)
  found = mix.vectors(rows_on(devices, prototypes), rows_on(devices, classifiers), hidden).on_host()
  for label in range(NUM_LABELS):
    for query in held_out.embeddings[:5]:
      score = prototypes[label] @ query
      if label in (WITHOUT, 7):
        wanted = score + 0.05 * (12 * score + offset @ query)
      else:
        wanted = score + 0.05 * SCALE * (classifiers[label, :-1] @ query)
      wanted /= 1 + 0.05 * 12
      assert found[label] @ query == pytest.approx(wanted, abs=1e-5)


def test_an_average_label_has_the_score_of_the_labels_near_a_query(task):
  prototypes, classifiers, held_out = task
  mix = label_vectors.mix_of(0.1, rows_on(2, prototypes), rows_on(2, classifiers), held_out)
  scores = held_out.embeddings @ prototypes.T
  near = np.argsort(-scores, axis=1)[:, :10]
  x = np.take_along_axis(scores, near, axis=1)
  y = np.take_along_axis(SCALE * held_out.embeddings @ classifiers[:, :-1].T, near, axis=1)
  design = np.stack([x.ravel(), np.ones(x.size)], axis=1)
  slope, constant = np.linalg.lstsq(design, y.ravel(), rcond=None)[0]
  assert mix.slope == pytest.approx(slope, rel=1e-3)
  assert held_out.embeddings.mean(axis=0) @ mix.offset == pytest.approx(constant, rel=1e-3)


def test_the_share_is_the_best_of_plain_search(task):
  prototypes, classifiers, held_out = task
  propensity = np.ones(NUM_LABELS)
  rows = rows_on(1, prototypes)
  mix, tried = label_vectors.choose_share(rows, rows_on(1, classifiers), held_out, propensity)
  assert [setting.share for setting in tried] == list(label_vectors.SHARES)
  for setting in tried:
    vectors = prototypes + setting.share * SCALE * classifiers[:, :-1]
    first = np.argmax(held_out.embeddings @ vectors.T, axis=1)
    assert setting.metrics["P@1"] == pytest.approx(100 * np.mean(first == held_out.labels.values), abs=1e-4)
  best = max(setting.metrics["P@1"] for setting in tried)
  assert mix.share > 0 and best > tried[0].metrics["P@1"] + 10
  noise = np.concatenate([unit(NUM_LABELS, 9), np.zeros((NUM_LABELS, 1), np.float32)], axis=1)
  assert label_vectors.choose_share(rows, rows_on(1, noise), held_out, propensity)[0].share == 0


def test_a_run_searches_them_and_new_labels_take_part(tmp_path):
  config = miniature_config(tmp_path, num_train=160)
  config.train.epochs, config.dataset.validation_fraction = 1, 0.3
  config.eval.update(dict(blend=True, retrieval_choose=True, classifier_share=0.05, classifier_epochs=1))
  final = train_and_evaluate(config, tmp_path / "run")
  assert final["classifier_share"] == 0.05
  config.eval.classifier_share = 0.0
  assert "classifier_share" not in train_and_evaluate(config, tmp_path / "without")
  index, plain = (LabelIndex.open(tmp_path / name / "index", checkpoint=None) for name in ("run", "without"))
  prototypes = np.asarray(plain.embeddings)
  classifiers = np.load(snapshots.read_current(plain.folder).path / "classifiers.npy")
  known = np.isfinite(classifiers[:, -1])
  wanted = prototypes + 0.05 * SCALE * classifiers[:, :-1]
  divisor = np.median(wanted[known] / index.embeddings[known])
  np.testing.assert_allclose(index.embeddings[known], (wanted / divisor)[known], atol=1e-3)
  np.testing.assert_allclose(index.embeddings[~known], index.vectors_of(prototypes)[~known], atol=1e-4)
  np.testing.assert_array_equal(plain.vectors_of(prototypes), prototypes)

  vixml_jax.load(tmp_path / "run").add_labels([{"uid": "otter", "title": "horse fish"}])
  changed = LabelIndex.open(tmp_path / "run" / "index", checkpoint=None)
  added = np.load(snapshots.read_current(changed.folder).path / "without_classifier.npy")
  assert np.abs(added).max() > 1e-3 and np.linalg.norm(changed.embeddings[-1] - added) == pytest.approx(1, abs=1e-5)
  np.testing.assert_array_equal(changed.delete([0]).vectors_of(prototypes), index.vectors_of(prototypes))
