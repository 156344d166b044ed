"""The blend's model: learning, storage, determinism, the dial, calibration, errors."""

import re

import lightgbm
import numpy as np
import pytest

from vixml_jax.blend import libraries
from vixml_jax.blend.calibration import Reliability
from vixml_jax.blend.features import FEATURES
from vixml_jax.blend.model import LEAST_FOR_ALL, NUM_MODELS, BlendModel, dial_scores
from vixml_jax.blend.ranking import ScoredCandidates
from vixml_jax.errors import InputError
from vixml_jax.ragged import Ragged


@pytest.fixture(scope="module")
def learned():
  """Features, hits whose probability is the first feature, and the model."""
  rng = np.random.default_rng(0)
  features = rng.uniform(0, 1, (4000, len(FEATURES))).astype(np.float32)
  features[::7, 3] = np.nan
  hits = rng.uniform(0, 1, 4000) < features[:, 0]
  return features, hits, BlendModel.fit(features, hits)


def test_probabilities_follow_the_feature_that_decides(learned):
  features, _, model = learned
  low, high = (model.probabilities(features[rows]).mean() for rows in (features[:, 0] < 0.1, features[:, 0] > 0.9))
  assert 0 < low < 0.15 and 0.85 < high < 1


def test_a_stored_model_gives_the_same_bits(learned):
  features, _, model = learned
  np.testing.assert_array_equal(BlendModel(model.text).probabilities(features), model.probabilities(features))
  assert BlendModel(model.text).probabilities(features[:0]).shape == (0,)


def test_likely_candidates_have_the_mean_of_all_models_and_the_others_that_of_the_first(learned):
  features, _, model = learned
  parts = re.split(r"(?m)^(?=tree$)", model.text)[1:]
  assert len(parts) == NUM_MODELS
  each = np.stack([lightgbm.Booster(model_str=part).predict(features) for part in parts])
  assert np.ptp(each, axis=0).max() > 0.01
  likely = each[0].astype(np.float32) >= LEAST_FOR_ALL
  assert 0 < likely.sum() < len(likely)
  np.testing.assert_allclose(model.probabilities(features), np.where(likely, each.mean(0), each[0]), rtol=1e-6)


def test_a_model_of_an_older_version_is_one_set_of_trees(learned):
  features, _, model = learned
  first = re.split(r"(?m)^(?=tree$)", model.text)[1]
  expected = lightgbm.Booster(model_str=first).predict(features)
  np.testing.assert_allclose(BlendModel(first).probabilities(features), expected, rtol=1e-6)


def test_training_again_with_any_number_of_threads_gives_the_same_trees(learned):
  features, hits, model = learned
  trees = lambda text: re.sub(r"\nparameters:.*?\nend of parameters", "", text, flags=re.DOTALL)
  for threads in (0, 1, 2):
    assert trees(BlendModel.fit(features, hits, threads).text) == trees(model.text)


def test_without_positives_or_with_a_damaged_or_other_model_there_is_one_line(learned):
  features, hits, model = learned
  with pytest.raises(InputError, match=r"0 of the 4000 candidates.*validation_fraction higher"):
    BlendModel.fit(features, np.zeros_like(hits))
  with pytest.raises(InputError, match="cannot be read"):
    BlendModel("tree\nnonsense")
  with pytest.raises(InputError, match="other features than this version"):
    BlendModel(model.text.replace("prototype_gap", "prototype_hole"))


def test_without_a_library_the_error_names_it_and_what_to_do(monkeypatch):
  libraries.check_blend_libraries()
  monkeypatch.setitem(__import__("sys").modules, "lightgbm", None)
  with pytest.raises(InputError, match=r"package lightgbm.*apt install libgomp1.*or do without the blend"):
    libraries.check_blend_libraries()


def _scored():
  candidates = Ragged.from_rows([[0, 1, 2, 3], [2], []])
  return ScoredCandidates(candidates, np.array([0.6, 0.3, 0.05, 0.3, 0.2], np.float32))


def test_labels_are_ranked_by_probability_and_places_without_candidates_are_empty():
  probabilities, ids = _scored().ranked(3, np.ones(4))
  assert ids.tolist() == [[0, 1, 3], [2, -1, -1], [-1, -1, -1]]
  np.testing.assert_allclose(probabilities[0], [0.6, 0.3, 0.3])
  assert np.isneginf(probabilities[1:][ids[1:] < 0]).all()


def test_labels_below_the_smallest_probability_are_left_out():
  assert _scored().ranked(4, np.ones(4), min_probability=0.25)[1].tolist() == [[0, 1, 3, -1], [-1] * 4, [-1] * 4]


def test_the_dial_never_moves_a_rarer_label_down():
  propensity = np.array([1.0, 2.0, 20.0, 3.0])
  places = []
  for tail in np.linspace(0, 1, 11):
    probabilities, ids = _scored().ranked(4, propensity, tail=tail)
    places.append(ids[0].tolist().index(2))
    np.testing.assert_allclose(probabilities[0], np.array([0.6, 0.3, 0.05, 0.3], np.float32)[ids[0]])
  assert places == sorted(places, reverse=True) and places[0] == 3 and places[-1] == 0


@pytest.mark.parametrize("tail", [-0.1, 1.1, float("nan")])
def test_a_dial_out_of_range_is_an_error(tail):
  with pytest.raises(InputError, match="between 0 and 1"):
    dial_scores(np.ones(1), np.ones(1), tail)


def test_calibration_error_by_hand():
  """Bin [0.2, 0.4): mean 0.3 and half of two hit; bin [0.8, 1]: mean 0.9, all of two hit."""
  probabilities, hits = np.array([0.25, 0.35, 0.8, 1.0]), np.array([True, False, True, True])
  whole = Reliability.of(probabilities, hits, num_bins=5)
  assert whole.ece == pytest.approx((2 * 0.2 + 2 * 0.1) / 4)
  assert [point["count"] for point in whole.points()] == [2, 2]
  assert (
    Reliability.of(probabilities[:1], hits[:1], 5) + Reliability.of(probabilities[1:], hits[1:], 5)
  ).ece == whole.ece
  assert Reliability.of(probabilities[:0], hits[:0]).ece == 0
