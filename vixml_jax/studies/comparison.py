"""Compares the runs of a study: means over seeds, and differences from the config as it is with a paired bootstrap."""

from collections.abc import Sequence
import dataclasses
import logging
import math
from pathlib import Path

import numpy as np
import scipy.stats

from vixml_jax.evaluation.metrics import QueryMetrics
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.files import write_json
from vixml_jax.report.charts import interval_chart
from vixml_jax.report.compare import Difference, paired_bootstrap
from vixml_jax.report.html_report import ROWS
from vixml_jax.report.pages import write_page
from vixml_jax.report.table import COLUMNS
from vixml_jax.studies.run_study import StudyRun, seconds_of
from vixml_jax.text_columns import aligned

_log = logging.getLogger(__name__)

_SHOWN = ("P@1", "P@5", "PSP@1", "PSP@5", "R@100")


@dataclasses.dataclass(frozen=True)
class CellResult:
  """The results of a cell in one way to rank.

  Attributes:
    cell: Name of the cell.
    row: "plain", "augmented" or "blend".
    seeds: Seeds of the finished runs.
    means: Each metric in percent, mean over the seeds.
    halves: Half the width of the 95 % interval of the mean over seeds (Student's t), empty for one seed.
    differences: Difference of each metric from the config as it is, on the same queries and seeds, with the interval
      of a paired bootstrap over queries. Empty for the config itself.
    train_seconds: Mean seconds of training.
  """

  cell: str
  row: str
  seeds: tuple[int, ...]
  means: dict[str, float]
  halves: dict[str, float]
  differences: dict[str, Difference]
  train_seconds: float


def compare_cells(runs: Sequence[StudyRun]) -> list[CellResult]:
  """Returns the results of all cells that have a finished run, in the order of the study.

  Runs that are not finished are left out with a warning. A difference is computed over the seeds that both cells have.
  If all seeds are evaluated on the same queries, the metrics of a query are averaged over them first. Held-out queries
  depend on the seed; then a query counts once for each seed that holds it out.
  """
  finished = [run for run in runs if run.finished]
  if len(finished) < len(runs):
    _log.warning("%d of %d runs are finished; the table has these only", len(finished), len(runs))
  by_cell: dict[str, dict[int, StudyRun]] = {}
  for run in finished:
    by_cell.setdefault(run.cell.name, {})[run.seed] = run
  loaded = {run.workdir: PerQuery.load(run.results) for run in finished}
  per_query = {workdir: results.rows for workdir, results in loaded.items()}
  same_queries = all(results.description == loaded[finished[0].workdir].description for results in loaded.values())
  over_seeds = _mean_over_seeds if same_queries else QueryMetrics.concatenate
  base = by_cell.get(runs[0].cell.name, {})
  found = []
  for name, of_seed in by_cell.items():
    for row in ROWS:
      results = {seed: per_query[run.workdir][row] for seed, run in of_seed.items() if row in per_query[run.workdir]}
      if not results:
        continue
      values = [result.mean() for result in results.values()]
      shared = [seed for seed in results if seed in base and row in per_query[base[seed].workdir]]
      differences = {}
      if shared and of_seed is not base:
        ours, theirs = (over_seeds([per_query[of[seed].workdir][row] for seed in shared]) for of in (of_seed, base))
        differences = paired_bootstrap(theirs, ours)
      found.append(
        CellResult(
          name,
          row,
          tuple(results),
          {metric: float(np.mean([value[metric] for value in values])) for metric in values[0]},
          {metric: _half_width([value[metric] for value in values]) for metric in values[0]} if len(values) > 1 else {},
          differences,
          float(np.mean([seconds_of(run) for run in of_seed.values()])),
        )
      )
  return found


def _mean_over_seeds(results: Sequence[QueryMetrics]) -> QueryMetrics:
  """Returns the metrics of each query, averaged over the runs of several seeds."""
  return dataclasses.replace(results[0], numerators=np.mean([result.numerators for result in results], axis=0))


def _half_width(values: Sequence[float]) -> float:
  """Returns half the width of the 95 % interval of a mean by Student's t distribution."""
  count = len(values)
  return float(scipy.stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))


def comparison_table(results: Sequence[CellResult]) -> str:
  """Returns the results as a table for the terminal, a block for each way to rank.

  A value is followed by half its interval over seeds, and by the difference from the config as it is; a star marks a
  difference whose interval does not contain 0.
  """
  blocks = []
  for row, title in ROWS.items():
    shown = [result for result in results if result.row == row]
    if shown:
      cells = [
        [result.cell, *(_cell(result, metric) for metric in _SHOWN), f"{result.train_seconds:.0f}"] for result in shown
      ]
      blocks.append("\n".join([title, *aligned([["", *_SHOWN, "seconds"], *cells])]))
  return "\n\n".join(blocks)


def _cell(result: CellResult, metric: str) -> str:
  text = f"{result.means[metric]:.2f}"
  if metric in result.halves:
    text += f" ±{result.halves[metric]:.2f}"
  found = result.differences.get(metric)
  if found is None:
    return text
  return f"{text} ({found.difference:+.2f}{'*' if found.low > 0 or found.high < 0 else ''})"


def write_comparison(folder: Path, study: str, split: str, results: Sequence[CellResult]) -> None:
  """Writes study-SPLIT.json and study-SPLIT.html.

  Args:
    folder: Folder of the study.
    study: Its name.
    split: The queries that were evaluated.
    results: Results of the cells.
  """
  shared = {"study": study, "split": split}
  write_json(folder / f"study-{split}.json", shared | {"results": [dataclasses.asdict(result) for result in results]})
  charts = []
  for row in ROWS:
    compared = [result for result in results if result.row == row and result.differences]
    for metric in _SHOWN if compared else ():
      bars = [
        (result.cell, found.difference, found.low, found.high)
        for result in compared
        for found in [result.differences[metric]]
      ]
      charts.append({"title": f"{ROWS[row]}: {metric}", "chart": interval_chart(f"differences in {metric}", bars)})
  rows = [
    {"cell": result.cell, "row": ROWS[result.row], "seeds": len(result.seeds), "seconds": f"{result.train_seconds:.0f}"}
    | {"cells": [_cell(result, metric) for metric in COLUMNS if metric in result.means]}
    for result in results
  ]
  columns = [metric for metric in COLUMNS if results and metric in results[0].means]
  write_page(folder / f"study-{split}.html", "study.html", columns=columns, rows=rows, charts=charts, **shared)
