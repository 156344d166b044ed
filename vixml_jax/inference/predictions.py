"""Predictions: labels that were found for queries, one by one or as columns."""

import dataclasses
import itertools
from typing import NamedTuple

import numpy as np

from vixml_jax.ragged import offsets_of


class Prediction(NamedTuple):
  """A label that was found for a query.

  Attributes:
    label: Uid of the label.
    id: Row of the label in the index.
    text: Text of the label.
    score: Cosine of query and prototype; with retrieval augmentation a share of probability.
  """

  label: str
  id: int
  text: str
  score: float


@dataclasses.dataclass(frozen=True)
class PredictionColumns:
  """Predictions for Q queries as columns, in which every label is named once.

  Attributes:
    labels: Uid, id and text of the M distinct labels.
    places: int64 [P], for each prediction the position of its label in `labels`; those of a query are adjacent.
    scores: float32 [P], see `Prediction`.
    lengths: int64 [Q], the number of predictions of each query.
  """

  labels: list[tuple[str, int, str]]
  places: np.ndarray
  scores: np.ndarray
  lengths: np.ndarray

  def rows(self) -> list[list[Prediction]]:
    """Returns the predictions of each query."""
    found = [
      Prediction._make((*self.labels[place], score))
      for place, score in zip(self.places.tolist(), self.scores.tolist(), strict=True)
    ]
    bounds = offsets_of(self.lengths).tolist()
    return [found[first:stop] for first, stop in itertools.pairwise(bounds)]
