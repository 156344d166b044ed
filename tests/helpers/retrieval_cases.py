"""Random labels, training queries and queries for tests of retrieval-augmented inference."""

from typing import NamedTuple

import numpy as np

from tests.helpers.search_cases import mesh_of_two, unit
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.retrieval_augmented import Neighbors, search_both

NUM_LABELS, NUM_TRAIN, NUM_QUERIES = 40, 70, 25


class RetrievalCase(NamedTuple):
  """Unit vectors of labels, training queries and queries; lists of labels for each training query and query."""

  labels: np.ndarray
  train: np.ndarray
  queries: np.ndarray
  train_labels: list[list[int]]
  truth: list[list[int]]
  exclude: list[list[int]]


def random_case() -> RetrievalCase:
  rng = np.random.default_rng(0)
  draw = lambda rows, least, most: [
    np.sort(rng.choice(NUM_LABELS, rng.integers(least, most), replace=False)).tolist() for _ in range(rows)
  ]
  return RetrievalCase(
    unit(NUM_LABELS, 1),
    unit(NUM_TRAIN, 2),
    unit(NUM_QUERIES, 3),
    draw(NUM_TRAIN, 0, 6),
    draw(NUM_QUERIES, 1, 8),
    draw(NUM_QUERIES, 0, 4),
  )


def neighbors_of(case: RetrievalCase, hits: int, **exclude) -> Neighbors:
  labels, train = (ExactIndex(part, mesh_of_two()) for part in (case.labels, case.train))
  return search_both(labels, train, case.queries, label_hits=hits, query_hits=hits, **exclude)
