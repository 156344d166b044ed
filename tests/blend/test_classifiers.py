"""Classifiers that are fitted on embeddings: what they learn, on any number of devices, and their scores."""

import jax
import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.blend import classifiers
from vixml_jax.blend.features import classifier_features
from vixml_jax.mining.rows import shard_rows
from vixml_jax.ragged import Ragged
from vixml_jax.sharded_rows import ShardedRows

NUM_LABELS, DIM = 13, 5


def _mesh(count):
  return sharding.make_mesh(fsdp=2 if count > 1 else 1, devices=jax.devices()[:count])


def _unit(rows, seed):
  vectors = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
  return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def fitted():
  """Embeddings near one of several centers, of which each is a label; the last label has no query."""
  centers = _unit(NUM_LABELS - 1, 2)
  labels = np.random.default_rng(3).integers(0, NUM_LABELS - 1, 400)
  embeddings = centers[labels] + 0.05 * _unit(400, 4)
  embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
  positives = Ragged.from_rows([[] if row % 50 == 0 else [label] for row, label in enumerate(labels.tolist())])

  def fit(devices, seed=0):
    rows = ShardedRows(shard_rows(embeddings, _mesh(devices)), len(embeddings))
    return classifiers.fit_classifiers(rows, positives, NUM_LABELS, epochs=10, seed=seed, batch_size=64)

  return embeddings, labels, fit


def test_classifiers_learn_the_label_of_each_query(fitted):
  embeddings, labels, fit = fitted
  found = fit(1)
  assert found.shape == (NUM_LABELS, DIM + 1)
  weights = found.on_host()
  assert np.isnan(weights).all(axis=1).tolist() == [False] * (NUM_LABELS - 1) + [True], "the last has no queries"
  scores = classifiers.SCALE * embeddings @ weights[:-1, :-1].T + weights[:-1, -1]
  assert np.mean(scores.argmax(axis=1) == labels) > 0.97


def test_devices_change_only_the_rounding_and_the_seed_the_order(fitted):
  _, _, fit = fitted
  one = fit(1).on_host()
  np.testing.assert_array_equal(one, fit(1).on_host())
  np.testing.assert_allclose(one, fit(8).on_host(), atol=2e-3)
  assert np.nanmax(np.abs(one - fit(1, seed=1).on_host())) > 1e-3


def test_scores_of_candidates_are_inner_products_in_any_blocks(monkeypatch):
  weights, embeddings = np.random.default_rng(5).normal(size=(NUM_LABELS, DIM + 1)).astype(np.float32), _unit(3, 6)
  weights[4] = np.nan
  candidates = Ragged.from_rows([[0, 4, 7], [], [1, 2, 3, 12]])
  expected = classifiers.SCALE * embeddings @ weights[:, :-1].T + weights[:, -1]
  rows = ShardedRows(shard_rows(weights, _mesh(2)), NUM_LABELS)
  for block in (2, 8192):
    monkeypatch.setattr(classifiers, "_PAIRS_PER_BLOCK", block)
    for find in (weights.__getitem__, lambda ids: np.asarray(rows.take(ids))):
      scores = classifiers.candidate_scores(find, candidates, embeddings)
      np.testing.assert_allclose(scores, expected[candidates.row_ids(), candidates.values], rtol=1e-5)
  assert np.isnan(scores).tolist() == [False, True, False, False, False, False, False]


def test_features_of_classifiers_by_hand():
  candidates = Ragged.from_rows([[0, 4, 7], [], [1, 2]])
  nan = np.nan
  found = classifier_features(np.array([1.5, nan, 2.0, nan, nan], np.float32), candidates)
  np.testing.assert_array_equal(found, [[1.5, 1, 0.5], [nan] * 3, [2, 0, 0], [nan] * 3, [nan] * 3])
  assert found.dtype == np.float32


def test_a_data_set_of_one_query_and_one_label_has_a_classifier():
  rows = ShardedRows(shard_rows(_unit(1, 0), _mesh(8)), 1)
  found = classifiers.fit_classifiers(rows, Ragged.from_rows([[0]]), 1, epochs=2, seed=0).on_host()
  assert found.shape == (1, DIM + 1) and np.all(np.isfinite(found))
