"""Queries with the worst and the best results."""

import numpy as np

from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.evaluation.shown_queries import extreme_queries


def test_extremes_are_by_ndcg_then_by_number_of_labels_and_none_is_both():
  values = np.array([0.5, 0.0, 1.0, 0.0, 1.0, 0.2, 0.0], np.float32)
  lengths = np.array([1, 1, 1, 3, 2, 1, 0])
  metrics = QueryMetrics(
    ("P@1", "nDCG@1", "nDCG@5"),
    np.stack([np.zeros(7), np.ones(7), values], 1).astype(np.float32),
    np.ones((7, 0), np.float32),
    (),
  )
  found = extreme_queries(metrics, lengths)
  assert found["worst"].tolist() == [3, 1, 5] and found["best"].tolist() == [4, 2, 0]
