"""Compares evaluated workdirs query by query: differences with intervals and p-values of a paired bootstrap."""

from collections.abc import Sequence
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.evaluation.bootstrap import resample
from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.files import write_json
from vixml_jax.report.charts import interval_chart
from vixml_jax.report.html_report import ROWS
from vixml_jax.report.pages import write_page
from vixml_jax.report.table import COLUMNS
from vixml_jax.run.workdir import COMPARISON, COMPARISON_PAGE, PER_QUERY
from vixml_jax.text_columns import aligned

_log = logging.getLogger(__name__)

RESAMPLES = 10_000
_RESAMPLES_AT_ONCE = 1_000


@dataclasses.dataclass(frozen=True)
class Difference:
  """A metric of two systems on the same queries.

  Attributes:
    first: Value of the first system, in percent.
    second: Value of the second system, in percent.
    difference: `second - first`, in percentage points.
    low: Lower bound of the 95% percentile interval of the difference.
    high: Upper bound of this interval.
    p: Two-sided p-value: twice the smaller of the fractions of samples with a difference of at most 0 and of at least
      0.
  """

  first: float
  second: float
  difference: float
  low: float
  high: float
  p: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The comparison of a row of another workdir with the same row of the first workdir.

  Attributes:
    other: Path of the other workdir.
    row: "plain", "augmented" or "blend".
    metrics: Difference of each metric, by name.
  """

  other: str
  row: str
  metrics: dict[str, Difference]


def paired_bootstrap(
  first: QueryMetrics, second: QueryMetrics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
  """Returns the difference of each metric of two systems, with its interval and p-value.

  Queries are resampled together with the results of both systems. Both systems have the same denominators (the number
  of queries, or the values of the best ranking), so the numerators are subtracted query by query before resampling. If
  two systems agree on each query, all differences are exactly 0.

  Intervals and p-values estimate how much a difference of these two models varies with the choice of queries. They do
  not include the variation over training seeds, and are not corrected for the number of metrics and systems.

  Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 15. The p-value is 1 - level
  of the widest percentile interval that does not contain 0.

  Args:
    first: Metrics of the first system on Q queries.
    second: Metrics of the second system on the same queries, with the same names and denominators.
    resamples: Number of samples S; the smallest possible p-value is 2 / (S + 1).
    seed: Seed of the draws.

  Raises:
    ValueError: If the two results belong to different queries or different metrics.
  """
  if first.names != second.names or not np.array_equal(first.denominators, second.denominators):
    raise ValueError("first and second: results of different queries or of different metrics cannot be compared")
  paired = dataclasses.replace(first, numerators=second.numerators - first.numerators)
  samples = np.concatenate(
    [
      resample(paired, resamples=min(_RESAMPLES_AT_ONCE, resamples - start), seed=seed + start)
      for start in range(0, resamples, _RESAMPLES_AT_ONCE)
    ]
  )
  low, high = np.percentile(samples, [2.5, 97.5], axis=0)
  tail = np.minimum((samples <= 0).sum(0), (samples >= 0).sum(0))
  p = np.minimum(2 * (tail + 1) / (len(samples) + 1), 1.0)
  means = first.mean(), second.mean()
  return {
    name: Difference(means[0][name], means[1][name], means[1][name] - means[0][name], *map(float, numbers))
    for name, *numbers in zip(first.names, low, high, p, strict=True)
  }


def compare_workdirs(workdir: Path, others: Sequence[Path], *, resamples: int = RESAMPLES) -> str:
  """Compares other workdirs with a workdir, and writes compare.json and compare.html to it.

  Args:
    workdir: An evaluated workdir.
    others: Workdirs that were evaluated on the same queries.
    resamples: Number of bootstrap samples.

  Returns:
    Tables for the terminal.

  Raises:
    InputError: If a workdir was not evaluated, or was evaluated on other data, on another split or with other metrics.
  """
  repeated = [
    path
    for number, path in enumerate(others)
    if path.resolve() in [other.resolve() for other in (workdir, *others[:number])]
  ]
  if repeated or not others:
    problem = f"{repeated[0]} occurs twice" if repeated else "contains no workdir"
    raise InputError(f"--compare={','.join(map(str, others))}: {problem}; set it to workdirs other than --workdir")
  first, seconds = PerQuery.load(workdir / PER_QUERY), {path: PerQuery.load(path / PER_QUERY) for path in others}
  for path, second in seconds.items():
    _check_same_queries(workdir, first, path, second)
    if first.rows.keys() != second.rows.keys():
      only = ", ".join(ROWS[name] for name in ROWS if (name in first.rows) != (name in second.rows))
      _log.warning("%s and %s: only one of them has these rows, which are left out: %s", workdir, path, only)
  comparisons = [
    Comparison(str(path), row, paired_bootstrap(first.rows[row], second.rows[row], resamples=resamples))
    for path, second in seconds.items()
    for row in ROWS
    if row in first.rows and row in second.rows
  ]
  _write(workdir, first, comparisons, resamples)
  return "\n\n".join(_table(workdir, comparison) for comparison in comparisons)


def _check_same_queries(workdir: Path, first: PerQuery, other: Path, second: PerQuery) -> None:
  """Checks that two results belong to the same queries and have the same metrics."""
  one, two = first.description, second.description
  for key in one.keys() | two.keys():
    if one.get(key) != two.get(key):
      raise InputError(
        f"{other}: was evaluated with {key} = {_short(two.get(key))}, but {workdir} with {_short(one.get(key))}; "
        "evaluate both on the same queries with python -m vixml_jax.evaluate"
      )
  plain, other_plain = first.rows["plain"], second.rows["plain"]
  if plain.names != other_plain.names:
    different = sorted(set(plain.names) ^ set(other_plain.names))
    raise InputError(
      f"{other}: has other metrics than {workdir} ({', '.join(different)}); evaluate both with the same "
      "config.eval.ks and config.eval.recall_ks"
    )
  if not np.array_equal(plain.denominators, other_plain.denominators):
    raise InputError(f"{other}: its queries have other labels than those of {workdir}; evaluate both again")


def _short(value: Any) -> str:
  """Returns the first 12 characters of a text such as a hash, and any other value as text."""
  return value[:12] if isinstance(value, str) else str(value)


def _write(workdir: Path, first: PerQuery, comparisons: Sequence[Comparison], resamples: int) -> None:
  queries = len(first.rows["plain"])
  shared = {"workdir": str(workdir), "of": dict(first.description), "queries": queries, "resamples": resamples}
  write_json(
    workdir / COMPARISON, shared | {"comparisons": [dataclasses.asdict(comparison) for comparison in comparisons]}
  )
  write_page(
    workdir / COMPARISON_PAGE,
    "compare.html",
    rankings=ROWS,
    comparisons=[
      dataclasses.asdict(comparison)
      | {
        "chart": interval_chart(
          f"differences of {comparison.other} from {workdir}",
          [(name, found.difference, found.low, found.high) for name, found in _shown(comparison)],
        )
      }
      for comparison in comparisons
    ],
    **shared,
  )


def _shown(comparison: Comparison) -> list[tuple[str, Difference]]:
  return [(name, comparison.metrics[name]) for name in COLUMNS if name in comparison.metrics]


def _table(workdir: Path, comparison: Comparison) -> str:
  rows = [("", "first", "second", "difference", "95% interval", "p")]
  rows += [
    (
      name,
      f"{found.first:.2f}",
      f"{found.second:.2f}",
      f"{found.difference:+.2f}",
      f"{found.low:+.2f} to {found.high:+.2f}",
      f"{found.p:.4f}",
    )
    for name, found in _shown(comparison)
  ]
  lines = aligned(rows)
  title = f"first: {workdir}; second: {comparison.other} ({ROWS[comparison.row]})"
  return "\n".join([title, "-" * len(lines[0]), *lines])
