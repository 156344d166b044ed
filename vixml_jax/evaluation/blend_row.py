"""The row `blend` of an evaluation: the trained blend, and its dial and calibration summed over blocks of queries."""

import dataclasses
from typing import Any

import numpy as np

from vixml_jax.blend.calibration import Reliability
from vixml_jax.blend.candidates import positives_of
from vixml_jax.blend.model import BlendModel
from vixml_jax.blend.ranking import BlendIndex, ScoredCandidates
from vixml_jax.evaluation.metrics import QueryMetrics, query_metrics
from vixml_jax.ragged import Ragged

TAILS = tuple(step / 10 for step in range(11))
"""Positions of the dial that are evaluated."""


@dataclasses.dataclass(frozen=True)
class BlendRanker:
  """A trained blend and what it searches.

  Attributes:
    model: The trained model.
    index: Words and labels of the training queries.
  """

  model: BlendModel
  index: BlendIndex


@dataclasses.dataclass(frozen=True)
class BlendResults:
  """Results of the blend.

  Attributes:
    metrics: Metrics in percent, by name, with the dial at 0.
    dial: `tail`, and P@1 and PSP@1 in percent, of each position of the dial.
    reliability: Probabilities of all candidates against the share of them that are positives.
  """

  metrics: dict[str, float]
  dial: list[dict[str, float]]
  reliability: Reliability

  @property
  def ece(self) -> float:
    """Expected calibration error of the probabilities of all candidates, in percent."""
    return 100 * self.reliability.ece

  def as_json(self) -> dict[str, Any]:
    """Returns the dial and the calibration as evaluation.json contains them."""
    return {"dial": self.dial, "ECE": self.ece, "reliability": self.reliability.points()}


class BlendCounts:
  """Sums behind the dial and the calibration, over blocks of queries."""

  def __init__(self, inverse_propensity: np.ndarray):
    """Starts with no queries.

    Args:
      inverse_propensity: Inverse propensities [L].
    """
    self._propensity = inverse_propensity
    self._sums: list[tuple[np.ndarray, np.ndarray]] = []
    self._last: QueryMetrics | None = None
    self._num_queries = 0
    self._reliability = Reliability.of(np.zeros(0), np.zeros(0, bool))

  def add(self, scored: ScoredCandidates, labels: Ragged) -> None:
    """Adds a block of queries.

    Args:
      scored: Candidates of the queries, Q rows.
      labels: Positives of the queries, Q rows.
    """
    sums = []
    for tail in TAILS:
      _, ids = scored.ranked(1, self._propensity, tail=tail)
      self._last = query_metrics(ids, labels, self._propensity, precision_ks=(1,), recall_ks=(1,))
      sums.append((self._last.numerators.sum(0, dtype=np.float64), self._last.denominators.sum(0, dtype=np.float64)))
    self._sums = [(a + c, b + d) for (a, b), (c, d) in zip(self._sums, sums, strict=True)] if self._sums else sums
    self._num_queries += len(labels)
    self._reliability += Reliability.of(scored.probabilities, positives_of(scored.candidates, labels))

  def results(self, metrics: dict[str, float]) -> BlendResults:
    """Returns the results of all queries so far, with the metrics of the row."""
    dial = []
    for tail, (numerators, denominators) in zip(TAILS, self._sums, strict=False):
      assert self._last is not None
      values = dict(
        zip(self._last.names, self._last.totals(numerators, denominators, self._num_queries).tolist(), strict=True)
      )
      dial.append({"tail": tail, "P@1": values["P@1"], "PSP@1": values["PSP@1"]})
    return BlendResults(metrics, dial, self._reliability)
