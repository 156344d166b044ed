"""Features of candidates: a case by hand, and random ones against loops."""

import math

import numpy as np

from tests.helpers.blend_cases import NUM_LABELS, NUM_TRAIN, random_labels, random_neighbors, softmax, votes_by_loops
from vixml_jax.blend.candidates import DEFAULT_WIDTHS, SHARP_TEMPERATURE, SMOOTH_TEMPERATURE, candidates_of, sources_of
from vixml_jax.blend.features import FEATURES, candidate_features
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import Neighbors


def test_the_features_of_three_labels_by_hand():
  """Label 0 is found by prototype, 1 by its neighbors and its name, 2 by both kinds of neighbors."""
  found = Neighbors(
    np.array([[0.9, -np.inf]], np.float32),
    np.array([[0, -1]], np.int32),
    np.array([[0.8, 0.7]], np.float32),
    np.array([[0, 1]], np.int32),
  )
  lexical = Neighbors(
    np.array([[0.5]], np.float32),
    np.array([[1]], np.int32),
    np.array([[0.6, 0.2]], np.float32),
    np.array([[1, 2]], np.int32),
  )
  sources = sources_of(found, lexical, Ragged.from_rows([[1, 2], [2], [2]]), 3)
  candidates = candidates_of(sources, DEFAULT_WIDTHS)
  sharp, smooth = (1 / (1 + math.exp(-0.1 / temperature)) for temperature in (SHARP_TEMPERATURE, SMOOTH_TEMPERATURE))
  nan = np.nan
  expected = {
    "prototype_score": [0.9, nan, nan],
    "prototype_rank": [0, nan, nan],
    "prototype_gap": [0, nan, nan],
    "vote_sharp": [0, sharp, 1],
    "vote_smooth": [0, smooth, 1],
    "best_voter": [nan, 0.8, 0.8],
    "lexical_score": [0, 0.5, 0],
    "lexical_vote": [0, 0, 1],
    "best_lexical_voter": [nan, nan, 0.6],
    "frequency_class": [0, 0.5, 1.5],  # ln 2 and ln 4 in steps of a half.
    "best_prototype_score": [0.9] * 3,
    "nearest_query": [0.8] * 3,
    "num_candidates": [3] * 3,
  }
  features = candidate_features(sources, candidates, np.array([0, 1, 3]))
  assert tuple(expected) == FEATURES and candidates[0].tolist() == [0, 1, 2]
  np.testing.assert_allclose(features.T, list(expected.values()), rtol=1e-6)


def test_votes_are_sums_over_the_neighbors_that_have_the_label():
  rng = np.random.default_rng(1)
  found, lexical, labels = random_neighbors(rng), random_neighbors(rng), random_labels(rng, NUM_TRAIN, 5)
  sources = sources_of(found, lexical, labels, NUM_LABELS)
  candidates = candidates_of(sources, DEFAULT_WIDTHS)
  features = candidate_features(sources, candidates, np.zeros(NUM_LABELS))
  tables = votes_by_loops(found, softmax(found.query_scores, SMOOTH_TEMPERATURE), labels)
  for query, label, row in zip(candidates.row_ids(), candidates.values, features, strict=True):
    vote, best = tables[query].get(label, (0, np.nan))
    np.testing.assert_allclose(row[[4, 5]], [vote, best], rtol=1e-5)


def test_queries_without_candidates_have_no_features_and_those_found_by_words_alone_have_no_infinite_ones():
  empty = np.full((2, 3), -np.inf, np.float32), np.full((2, 3), -1, np.int32)
  nothing = Neighbors(*empty, *empty)
  labels = Ragged.from_rows([[1]])
  sources = sources_of(nothing, nothing, labels, 4)
  candidates = candidates_of(sources, DEFAULT_WIDTHS)
  assert candidate_features(sources, candidates, np.zeros(4)).shape == (0, len(FEATURES))
  words = Neighbors(np.array([[0.5], [-np.inf]], np.float32), np.array([[2], [-1]], np.int32), *empty)
  sources = sources_of(nothing, words, labels, 4)
  candidates = candidates_of(sources, DEFAULT_WIDTHS)
  assert [candidates[query].tolist() for query in range(2)] == [[2], []]
  (row,) = candidate_features(sources, candidates, np.zeros(4))
  assert not np.isposinf(row).any() and row[FEATURES.index("lexical_score")] == 0.5
