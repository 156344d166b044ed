"""Selection of lambda and temperature of retrieval-augmented inference on held-out queries."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Protocol, TypeVar

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.evaluation.metrics import evaluate
from vixml_jax.ragged import Ragged
from vixml_jax.search.retrieval_augmented import Neighbors, combine

LAMBDAS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99, 0.997, 0.999)
TEMPERATURES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15)
_DEPTH = 100
_Measured = TypeVar("_Measured", bound="Measured")


class Measured(Protocol):
  """A setting with the metrics that it reaches."""

  @property
  def metrics(self) -> Mapping[str, float]:
    """Metrics in percent, by name."""


@dataclasses.dataclass(frozen=True)
class Setting:
  """A pair of lambda and temperature, and the metrics that it reaches.

  Attributes:
    lambda_: Weight of the labels' own mass; that of the training queries is 1 - lambda_.
    temperature: Divisor of the scores before the softmax.
    metrics: Metrics in percent, by name.
  """

  lambda_: float
  temperature: float
  metrics: dict[str, float]


def choose(
  neighbors: Neighbors,
  labels_of_queries: Ragged,
  truth: Ragged,
  propensity: np.ndarray,
  *,
  lambdas: Sequence[float] = LAMBDAS,
  temperatures: Sequence[float] = TEMPERATURES,
  metric: str = "P@1",
  exclude: Ragged | None = None,
) -> tuple[Setting, list[Setting]]:
  """Evaluates every lambda with every temperature on held-out queries and returns the one that `pick` selects.

  Args:
    neighbors: Neighbors of the Q held-out queries, which must not include the queries themselves.
    labels_of_queries: Labels of the N training queries.
    truth: Positives of the held-out queries, Q rows.
    propensity: Inverse propensities, [L].
    lambdas: Values of lambda to try.
    temperatures: Temperatures to try.
    metric: Metric to choose by, such as "P@1"; see `pick`.
    exclude: Labels to leave out for each held-out query, Q rows.

  Returns:
    The chosen setting, and all settings with P@1, PSP@1, R@100 and `metric`.

  Raises:
    InputError: There is no such metric, or a lambda or temperature is out of range.
  """
  settings = []
  for temperature in temperatures:
    for lambda_ in lambdas:
      _, ids = combine(
        neighbors,
        labels_of_queries,
        num_labels=len(propensity),
        lambda_=lambda_,
        temperature=temperature,
        k=_DEPTH,
        exclude=exclude,
      )
      metrics = evaluate(ids, truth, propensity)
      if metric not in metrics:
        raise InputError(f"metric {metric!r} to choose lambda and temperature by is not one of {', '.join(metrics)}")
      shown = dict.fromkeys(("P@1", "PSP@1", "R@100", metric))
      settings.append(Setting(lambda_, temperature, {name: metrics[name] for name in shown}))
  return pick(settings, metric, len(truth)), settings


def pick(settings: Sequence[_Measured], metric: str, num_queries: int) -> _Measured:
  """Returns the setting of greatest R@100 among those that are not measurably worse than the best in `metric`.

  With a few hundred held-out queries, many settings differ by less than the noise. Among these, the one that finds most
  labels is the most useful to a later ranking stage. "Not measurably worse" means within one standard error of the
  best, which is at most sqrt(p (1 - p) / Q) for a metric of mean p (the one-standard-error rule, Breiman et al. 1984).
  Among equals, the first is returned.

  Args:
    settings: Settings with `metric` and R@100, in percent.
    metric: Metric to choose by.
    num_queries: Number of queries Q behind each mean.
  """
  best = max(setting.metrics[metric] for setting in settings)
  share = best / 100
  floor = best - 100 * math.sqrt(max(share * (1 - share), 0.0) / num_queries)
  return max((s for s in settings if s.metrics[metric] >= floor), key=lambda setting: setting.metrics["R@100"])
