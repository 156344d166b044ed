"""Measures whether probabilities are calibrated: expected calibration error and the points of a reliability diagram.

Naeini et al., Obtaining Well Calibrated Probabilities Using Bayesian Binning, AAAI 2015.
"""

import dataclasses
from typing import Any

import numpy as np

NUM_BINS = 15


@dataclasses.dataclass(frozen=True)
class Reliability:
  """Sums over the predictions of each bin; bin b of B has the probabilities from b / B to (b + 1) / B.

  >>> part = Reliability.of(np.array([0.25, 0.25, 0.75]), np.array([False, True, True]), num_bins=2)
  >>> round(part.ece, 4), part.points()
  (0.25, [{'probability': 0.25, 'share': 0.5, 'count': 2}, {'probability': 0.75, 'share': 1.0, 'count': 1}])

  Attributes:
    counts: Number of predictions of each bin, int64 [B].
    probabilities: Sum of their probabilities, float64 [B].
    hits: Number of them that are right, int64 [B].
  """

  counts: np.ndarray
  probabilities: np.ndarray
  hits: np.ndarray

  @classmethod
  def of(cls, probabilities: np.ndarray, hits: np.ndarray, num_bins: int = NUM_BINS) -> "Reliability":
    """Returns the sums of predictions.

    Args:
      probabilities: Predicted probabilities, [P].
      hits: Whether each prediction is right, bool [P].
      num_bins: Number of bins of equal width, B.
    """
    bins = np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)
    return cls(
      np.bincount(bins, minlength=num_bins),
      np.bincount(bins, probabilities.astype(np.float64), minlength=num_bins),
      np.bincount(bins[hits], minlength=num_bins),
    )

  def __add__(self, other: "Reliability") -> "Reliability":
    return Reliability(self.counts + other.counts, self.probabilities + other.probabilities, self.hits + other.hits)

  @property
  def ece(self) -> float:
    """Expected calibration error, 0 to 1: mean over predictions of |mean probability - share of hits| of the bin."""
    return float(np.abs(self.probabilities - self.hits).sum() / max(int(self.counts.sum()), 1))

  def points(self) -> list[dict[str, Any]]:
    """Returns mean probability, share of hits and number of predictions of each bin that has some."""
    return [
      {"probability": float(total / count), "share": float(hits / count), "count": int(count)}
      for count, total, hits in zip(self.counts, self.probabilities, self.hits, strict=True)
      if count
    ]
