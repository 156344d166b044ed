"""Writes the files of an evaluation: evaluation.json, per_query.npz, report.html; formats the table of results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vixml_jax.evaluation.blend_row import BlendResults
from vixml_jax.evaluation.evaluator import EvaluationConfig
from vixml_jax.evaluation.per_query import PerQuery, describe_queries
from vixml_jax.evaluation.results import Evaluation
from vixml_jax.evaluation.shown_queries import ShownQueries
from vixml_jax.evaluation.small_vectors import BYTES, METRICS
from vixml_jax.files import write_json
from vixml_jax.input.corpus import Corpus
from vixml_jax.ragged import Ragged
from vixml_jax.report.examples import collect_examples
from vixml_jax.report.html_report import write_report
from vixml_jax.report.label_map import LabelMap
from vixml_jax.report.table import metrics_table
from vixml_jax.run.environment import describe_environment
from vixml_jax.run.workdir import EVALUATION, PER_QUERY
from vixml_jax.text_columns import aligned


def write_evaluation(
  workdir: Path,
  result: Evaluation,
  fewer_images: Mapping[int, Evaluation],
  *,
  split: str,
  search: str,
  num_labels: int,
  has_images: np.ndarray | None,
  bootstrap_samples: int,
  baselines: Mapping[str, Mapping[str, float]],
  confusions: Mapping[str, Sequence[Mapping[str, Any]]],
  small_vectors: Mapping[str, Mapping[str, float]],
) -> None:
  """Writes evaluation.json: a description of the evaluated queries, and all results in detail.

  Args:
    workdir: Folder of the run.
    result: Results on the evaluated queries.
    fewer_images: Results on the same queries with at most a number of images, by this number.
    split: "test" or "validation".
    search: "exact" or "scann".
    num_labels: Number of labels L.
    has_images: bool [Q], whether each evaluated query has images; None for a model of texts only.
    bootstrap_samples: Number of bootstrap samples for the intervals of both groups.
    baselines: Metrics of each baseline in percent, by name.
    confusions: Labels that are ranked first in place of true ones (`describe_confusions`).
    small_vectors: Metrics and size of smaller vectors, by name.
  """
  write_json(
    workdir / EVALUATION,
    {
      "split": split,
      "search": search,
      "labels": num_labels,
      "queries": len(result.per_query["plain"]),
      "by_images": {} if has_images is None else _by_images(result, has_images, bootstrap_samples),
      "intervals_95": result.intervals,
      "by_label_frequency": result.deciles,
      "scann_recall": result.scann_recall,
      **({} if result.blend is None else {"blend": result.blend.as_json()}),
      "by_test_images": {
        count: {"metrics": other.final_metrics(), "intervals_95": other.intervals}
        for count, other in fewer_images.items()
      },
      "baselines": baselines,
      "confusions": confusions,
      "environment": describe_environment(),
      **({"small_vectors": small_vectors} if small_vectors else {}),
    },
  )


def write_report_files(
  workdir: Path,
  corpus: Corpus,
  result: Evaluation,
  shown: Sequence[ShownQueries],
  label_map: LabelMap,
  *,
  split: str,
  rows: np.ndarray,
  propensity: tuple[float, float],
  learning_rates: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
  """Writes per_query.npz and report.html to a workdir that contains evaluation.json and final_metrics.json.

  Args:
    workdir: Folder of the run.
    corpus: Data set with the texts and images of the examples.
    result: Results on the evaluated queries.
    shown: Queries to show, with their rankings.
    label_map: Labels on a plane.
    split: "test", or "validation" for held-out queries of the training split.
    rows: Row of each query in the test or training split, int64 [Q].
    propensity: Constants A and B of the propensity in PSP.
    learning_rates: The (step, learning rate) pairs of each group of parameters, between which the rate is linear.
  """
  description = describe_queries(corpus.builder, split, None if split == "test" else rows, propensity)
  PerQuery(description, result.per_query).save(workdir / PER_QUERY)
  dataset_split = "train" if split == "validation" else split
  examples = {
    group.title: collect_examples(corpus, dataset_split, rows[group.queries], group.labels, group.ids, group.scores)
    for group in shown
  }
  write_report(workdir, examples, learning_rates, label_map)


def describe_confusions(corpus: Corpus, result: Evaluation, truth: Ragged) -> dict[str, list[dict[str, Any]]]:
  """Returns the pairs of labels that are confused most, of each row.

  Args:
    corpus: Data set with the texts of labels.
    result: Results on the evaluated queries.
    truth: Positives of the evaluated queries.

  Returns:
    JSON: `predicted` and `true`, the texts of both labels; `queries`, the number of queries with the true label for
    which the other one is ranked first; `of`, the number of queries with the true label.
  """
  frequencies = np.bincount(truth.values, minlength=corpus.num_labels)
  described = {}
  for name, pairs in result.confusions.items():
    labels = np.unique(pairs[:, :2]).tolist()
    texts = dict(zip(labels, corpus.label_text(labels), strict=True))
    described[name] = [
      {"predicted": texts[predicted], "true": texts[true], "queries": queries, "of": int(frequencies[true])}
      for predicted, true, queries in pairs.tolist()
    ]
  return described


def results_table(
  name: str,
  result: Evaluation,
  fewer_images: Mapping[int, Evaluation],
  config: EvaluationConfig,
  baselines: Mapping[str, Mapping[str, float]],
  small_vectors: Mapping[str, Mapping[str, float]],
) -> str:
  """Returns the table for the terminal: the rows of the run, and the baselines below them.

  Args:
    name: Name of the run.
    result: Results on the evaluated queries.
    fewer_images: Results on the same queries with at most a number of images, by this number.
    config: Settings of the evaluation.
    baselines: Metrics of each baseline in percent, by name.
    small_vectors: Metrics and size of smaller vectors, by name.
  """
  settings = config.retrieval
  retrieval = settings and f"+ retrieval (lambda {settings.lambda_:g}, T {settings.temperature:g})"
  rows: dict[str, dict[str, float]] = {}
  intervals = {}
  named = {name: result} | {
    f"at most {count} image{'' if count == 1 else 's'} per query": other for count, other in fewer_images.items()
  }
  for row, other in named.items():
    rows[row], intervals[row] = other.plain, other.intervals["plain"]
    if retrieval:
      below = retrieval if other is result else f"{row} + retrieval"
      rows[below], intervals[below] = other.augmented, other.intervals["augmented"]
    if other.blend is not None:
      below = "blend" if other is result else f"{row}, blend"
      rows[below], intervals[below] = other.blend.metrics, other.intervals["blend"]
  table = metrics_table(rows, baselines=baselines or None, intervals=intervals)
  parts = [table]
  if result.blend is not None:
    parts.append(_dial_text(result.blend))
  if small_vectors:
    parts.append(_small_vectors_text(small_vectors))
  found = ", ".join(f"{key} {value:.1f}" for key, value in result.scann_recall.items())
  return "\n".join([*parts, *([f"ScaNN against exact search: {found}"] if found else [])])


def _dial_text(blend: BlendResults) -> str:
  """Returns the dial between frequent and rare labels as a table, and the calibration error."""
  rows = [["tail", *(f"{point['tail']:.1f}" for point in blend.dial)]]
  rows += [[name, *(f"{point[name]:.2f}" for point in blend.dial)] for name in ("P@1", "PSP@1")]
  calibration = f"expected calibration error of its probabilities: {blend.ece:.2f} %"
  return "\n".join(["", "blend by its dial from frequent to rare labels:", *aligned(rows), calibration])


def _small_vectors_text(small_vectors: Mapping[str, Mapping[str, float]]) -> str:
  """Returns metrics and sizes of smaller vectors as a table."""
  rows = [["", *METRICS, BYTES]]
  for name, values in small_vectors.items():
    rows.append([name, *(f"{values[metric]:.2f}" for metric in METRICS), f"{values[BYTES]:,.0f}"])
  return "\n".join(["", "plain search with smaller vectors:", *aligned(rows)])


def _by_images(result: Evaluation, has_images: np.ndarray, bootstrap_samples: int) -> dict[str, Any]:
  """Returns the results of the queries with images and of those without."""
  groups = {"with images": np.flatnonzero(has_images), "without images": np.flatnonzero(~has_images)}
  return {name: result.of_queries(group, bootstrap_samples) for name, group in groups.items() if len(group)}
