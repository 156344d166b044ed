"""Candidates of the blend against loops over labels; excluded labels and filters."""

import numpy as np
import pytest

from tests.helpers.blend_cases import (
  NUM_LABELS,
  NUM_QUERIES,
  NUM_TRAIN,
  random_labels,
  random_neighbors,
  softmax,
  votes_by_loops,
)
from vixml_jax.blend.candidates import SMOOTH_TEMPERATURE, BlendWidths, candidates_of, sources_of
from vixml_jax.ragged import Ragged
from vixml_jax.search.filters import Filters, IdSets
from vixml_jax.search.retrieval_augmented import Neighbors

WIDTHS = BlendWidths(labels=5, queries=4, voted=3, lexical_labels=5, lexical_queries=4, lexical_voted=2)


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  return random_neighbors(rng), random_neighbors(rng, empty=2), random_labels(rng, NUM_TRAIN, 5)


def _expected(case):
  """The union for each query, label by label."""
  found, lexical, labels = case
  shares = np.where(lexical.query_ids >= 0, lexical.query_scores, 0)
  rows = []
  for query, (votes, lexical_votes) in enumerate(
    zip(
      votes_by_loops(found, softmax(found.query_scores, SMOOTH_TEMPERATURE), labels),
      votes_by_loops(lexical, shares / shares.sum(1, keepdims=True), labels),
      strict=True,
    )
  ):
    top = lambda table, count: sorted(table, key=lambda label: (-table[label][0], label))[:count]
    union = {*found.label_ids[query].tolist(), *lexical.label_ids[query].tolist()} - {-1}
    rows.append(sorted(union | {*top(votes, WIDTHS.voted)} | {*top(lexical_votes, WIDTHS.lexical_voted)}))
  return rows


def _candidates(case, **limits):
  found = candidates_of(sources_of(*case, NUM_LABELS), WIDTHS, **limits)
  return [row.tolist() for row in (found[query] for query in range(len(found)))]


def test_candidates_are_the_union_of_the_best_of_each_source(case):
  assert _candidates(case) == _expected(case)


def test_excluded_and_forbidden_labels_are_no_candidates(case):
  exclude = Ragged.from_rows([[row[0]] for row in _expected(case)])
  allow = IdSets.from_rows([None, [1, 2, 3], [], *[None] * (NUM_QUERIES - 3)])
  deny = IdSets.from_rows([*[None] * (NUM_QUERIES - 1), list(range(15))])
  expected = [row[1:] for row in _expected(case)]
  expected[1] = [label for label in expected[1] if label in (1, 2, 3)]
  expected[2] = []
  expected[-1] = [label for label in expected[-1] if label >= 15]
  assert _candidates(case, exclude=exclude, filters=Filters(allow, deny)) == expected


def test_a_query_that_finds_nothing_has_no_candidates():
  nothing = Neighbors(*(np.full((2, 3), value, kind) for value, kind in ((-np.inf, np.float32), (-1, np.int32)) * 2))
  assert _candidates((nothing, nothing, Ragged.from_rows([[1]]))) == [[], []]
