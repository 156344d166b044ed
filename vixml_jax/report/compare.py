"""Compares evaluated workdirs query by query: differences with their intervals and p-values by a paired bootstrap."""

from collections.abc import Sequence
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.evaluation.bootstrap import resample
from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.evaluation.per_query import FILE, PerQuery
from vixml_jax.files import write_json
from vixml_jax.report.charts import interval_chart
from vixml_jax.report.html_report import ROWS
from vixml_jax.report.pages import write_page
from vixml_jax.report.table import COLUMNS

_log = logging.getLogger(__name__)

RESAMPLES = 10_000
_AT_ONCE = 1_000


@dataclasses.dataclass(frozen=True)
class Difference:
  """One metric of two systems on the same queries.

  Attributes:
    first: of the first, in percent.
    second: of the second.
    difference: second - first, in points.
    low, high: the 95% percentile interval of the difference.
    p: two-sided: twice the smaller share of samples in which the difference is not above, or not below, 0.
  """

  first: float
  second: float
  difference: float
  low: float
  high: float
  p: float


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One row ("plain" or "augmented") of another workdir against that of the first: every metric by name."""

  other: str
  row: str
  metrics: dict[str, Difference]


def paired_bootstrap(
  first: QueryMetrics, second: QueryMetrics, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Difference]:
  """Resamples queries, each with the results of both systems.

  Both divide by the same (the queries, or the best that can be reached on them), so the difference of a sample is
  that of the numerators, query by query, over this; where two systems agree on every query it is exactly 0.

  They tell how a difference would move with other queries of the same kind, for these two models. They say nothing
  about other training seeds, and are not corrected for the number of metrics and systems.

  Reference: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 13 and 15; p is the smallest
  1 - level of a percentile interval that does not hold 0.

  Args:
    first: of Q queries.
    second: of the same queries, with the same names and denominators.
    resamples: S; the least p is 2 / (S + 1).
    seed: seed of the draws.

  Raises:
    ValueError: the two are not of the same queries.
  """
  if first.names != second.names or not np.array_equal(first.denominators, second.denominators):
    raise ValueError("the two results are not of the same queries, or not of the same metrics")
  paired = dataclasses.replace(first, numerators=second.numerators - first.numerators)
  samples = np.concatenate(
    [
      resample(paired, resamples=min(_AT_ONCE, resamples - start), seed=seed + start)
      for start in range(0, resamples, _AT_ONCE)
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
  """Compares others with a workdir, and writes compare.json and compare.html into it.

  Args:
    workdir: an evaluated workdir.
    others: other ones, evaluated on the same queries.
    resamples: samples of the bootstrap.

  Returns:
    tables for the terminal.

  Raises:
    InputError: naming a workdir that was not evaluated, or on other data, another split or with other metrics.
  """
  repeated = [
    path
    for number, path in enumerate(others)
    if path.resolve() in [other.resolve() for other in (workdir, *others[:number])]
  ]
  if repeated or not others:
    named = f"{repeated[0]} is named twice" if repeated else "names no workdir"
    raise InputError(f"--compare={','.join(map(str, others))}: {named}; give other workdirs than --workdir")
  first, seconds = PerQuery.load(workdir / FILE), {path: PerQuery.load(path / FILE) for path in others}
  for path, second in seconds.items():
    _check_same_queries(workdir, first, path, second)
    if first.rows.keys() != second.rows.keys():
      _log.warning("%s and %s: only one has a retrieval-augmented row; it is left out", workdir, path)
  comparisons = [
    Comparison(str(path), row, paired_bootstrap(first.rows[row], second.rows[row], resamples=resamples))
    for path, second in seconds.items()
    for row in ROWS
    if row in first.rows and row in second.rows
  ]
  _write(workdir, first, comparisons, resamples)
  return "\n\n".join(_table(workdir, comparison) for comparison in comparisons)


def _check_same_queries(workdir: Path, first: PerQuery, other: Path, second: PerQuery) -> None:
  """Refuses what cannot be paired, by name."""
  for key in first.of.keys() | second.of.keys():
    if first.of.get(key) != second.of.get(key):
      raise InputError(
        f"{other}: was evaluated on {key} {_short(second.of.get(key))}, but {workdir} on "
        f"{_short(first.of.get(key))}; evaluate both on the same with python -m vixml_jax.evaluate"
      )
  one, two = first.rows["plain"], second.rows["plain"]
  if one.names != two.names:
    different = sorted(set(one.names) ^ set(two.names))
    raise InputError(
      f"{other}: has other metrics than {workdir} ({', '.join(different)}); set the same "
      "config.eval.ks and config.eval.recall_ks"
    )
  if not np.array_equal(one.denominators, two.denominators):
    raise InputError(f"{other}: its queries have other labels than those of {workdir}; evaluate both again")


def _short(value: Any) -> str:
  """A digest by its beginning, anything else whole."""
  return value[:12] if isinstance(value, str) else str(value)


def _write(workdir: Path, first: PerQuery, comparisons: Sequence[Comparison], resamples: int) -> None:
  queries = len(first.rows["plain"])
  shared = {"workdir": str(workdir), "of": dict(first.of), "queries": queries, "resamples": resamples}
  write_json(
    workdir / "compare.json", shared | {"comparisons": [dataclasses.asdict(comparison) for comparison in comparisons]}
  )
  write_page(
    workdir / "compare.html",
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
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
    for row in rows
  ]
  head = f"first: {workdir}; second: {comparison.other} ({ROWS[comparison.row]})"
  return "\n".join([head, "-" * len(lines[0]), *lines])
