"""Counts which labels are ranked first in place of which true labels."""

import numpy as np

from vixml_jax.ragged import Ragged
from vixml_jax.search.membership import is_in_row


class ConfusionCounts:
  """Counts pairs of a label that is ranked first although it is wrong, and a true label of the same query.

  Args:
    num_labels: Number of labels L.
  """

  def __init__(self, num_labels: int):
    self._num_labels = num_labels
    self._codes = np.zeros(0, np.int64)
    self._counts = np.zeros(0, np.int64)

  def add(self, first: np.ndarray, labels: Ragged) -> None:
    """Adds the queries of a block.

    Args:
      first: int [Q], the label that is ranked first for each query; -1 for none.
      labels: Positives of each query, Q rows. Queries without positives are not counted.
    """
    wrong = np.flatnonzero((first >= 0) & (labels.lengths > 0) & ~is_in_row(first[:, None], labels)[:, 0])
    true = labels.take(wrong)
    codes = np.repeat(first[wrong].astype(np.int64), true.lengths) * self._num_labels + true.values
    self._codes, places = np.unique(np.concatenate([self._codes, codes]), return_inverse=True)
    weights = np.concatenate([self._counts, np.ones(len(codes), np.int64)])
    self._counts = np.bincount(places, weights=weights, minlength=len(self._codes)).astype(np.int64)

  def most(self, number: int) -> np.ndarray:
    """Returns the most frequent pairs, int64 [P, 3]: predicted label, true label, number of queries.

    Pairs of one query only are left out. Among equal counts, lower ids come first.
    """
    order = np.argsort(-self._counts, kind="stable")[:number]
    order = order[self._counts[order] > 1]
    codes = self._codes[order]
    return np.stack([codes // self._num_labels, codes % self._num_labels, self._counts[order]], axis=1)
