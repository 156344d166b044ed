"""Results of an evaluation: means, intervals, deciles and examples of each row."""

import dataclasses
from typing import Any

import numpy as np

from vixml_jax.evaluation import metrics
from vixml_jax.evaluation.blend_row import BlendResults
from vixml_jax.evaluation.bootstrap import bootstrap_intervals


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Results on one split; all values in percent.

  Attributes:
    plain: metrics of plain search over the prototypes.
    augmented: metrics of retrieval-augmented inference; empty where it was not asked for.
    intervals: 95% bootstrap intervals of each row, under "plain", "augmented" and "blend".
    deciles: metrics by label frequency, of each row.
    scann_recall: share of the exact top hits that ScaNN finds, by k; empty where the two were not compared.
    per_query: metrics of every query, of each row.
    examples: int64 [E], numbers of the queries whose rankings are kept.
    ids: int32 [E, K], labels found, of each row.
    scores: float32 [E, K], of each row.
    confusions: the most frequent pairs of a label that is wrongly ranked first and a true label, of each row, int64
      [P, 3]: predicted label, true label, number of queries.
    blend: results of the blend; None where it was not asked for.
  """

  plain: dict[str, float]
  augmented: dict[str, float]
  intervals: dict[str, dict[str, tuple[float, float]]]
  deciles: dict[str, list[dict[str, Any]]]
  scann_recall: dict[str, float]
  per_query: dict[str, metrics.QueryMetrics]
  examples: np.ndarray
  ids: dict[str, np.ndarray]
  scores: dict[str, np.ndarray]
  confusions: dict[str, np.ndarray]
  blend: BlendResults | None = None

  def final_metrics(self) -> dict[str, Any]:
    """Returns the flat keys of final_metrics.json: the plain row, the others under `RA/` and `blend/`."""
    scann = {f"ScaNN/{name}": value for name, value in self.scann_recall.items()}
    blend = {} if self.blend is None else self.blend.metrics | {"ECE": self.blend.ece}
    return _flat_metrics(self.plain, self.augmented, blend) | scann

  def of_queries(self, rows: np.ndarray, bootstrap_samples: int) -> dict[str, Any]:
    """Returns the results on some of the queries, as evaluation.json contains them.

    Args:
      rows: int [R], which queries, at least one.
      bootstrap_samples: resamples behind the intervals; 0 for no intervals.

    Returns:
      `queries`, their number; `metrics`, flat; `intervals_95` of each row.
    """
    some = {name: values.take(rows) for name, values in self.per_query.items()}
    means = {name: values.mean() for name, values in some.items()}
    return {
      "queries": len(rows),
      "metrics": _flat_metrics(means["plain"], means.get("augmented", {}), means.get("blend")),
      "intervals_95": intervals_of(some, bootstrap_samples),
    }


def _flat_metrics(
  plain: dict[str, float], augmented: dict[str, float], blend: dict[str, float] | None = None
) -> dict[str, float]:
  second = {f"RA/{name}": value for name, value in augmented.items()}
  return plain | second | {f"blend/{name}": value for name, value in (blend or {}).items()}


def intervals_of(
  per_query: dict[str, metrics.QueryMetrics], resamples: int
) -> dict[str, dict[str, tuple[float, float]]]:
  """Returns the 95% bootstrap intervals of each row; empty ones with 0 resamples."""
  return {
    name: bootstrap_intervals(values, resamples=resamples) if resamples else {} for name, values in per_query.items()
  }
