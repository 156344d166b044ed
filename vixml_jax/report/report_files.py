"""What an evaluation leaves for people: metrics by group of queries, `per_query.npz` to compare by, `report.html`."""

from typing import Any

import numpy as np

from vixml_jax.evaluation import per_query
from vixml_jax.evaluation.evaluator import Evaluation, Queries
from vixml_jax.report.examples import collect_examples
from vixml_jax.report.html_report import write_report
from vixml_jax.run.from_config import Run
from vixml_jax.training.optimizer import schedule


def describe(run: Run, result: Evaluation) -> dict[str, Any]:
  """What evaluation.json says of the queries: which, how many, and metrics by whether they have images."""
  evaluation = run.config.eval
  return {
    "split": evaluation.split,
    "search": evaluation.search,
    "labels": run.corpus.num_labels,
    "queries": len(result.per_query["plain"]),
    "by_images": _by_images(run, result),
  }


def write_report_files(run: Run, result: Evaluation, queries: Queries) -> None:
  """Writes both files into the workdir, which holds evaluation.json and final_metrics.json already."""
  data, split = run.config.dataset, run.config.eval.split
  source, rows = _rows(run)
  of = per_query.evaluated_on(
    run.corpus.builder, split, None if split == "test" else rows, (data.propensity_a, data.propensity_b)
  )
  per_query.PerQuery(of, result.per_query).save(run.workdir / per_query.FILE)
  examples = collect_examples(run.corpus, source, rows, queries.labels, result.ids, result.scores)
  write_report(run.workdir, examples, _learning_rates(run))


def _rows(run: Run) -> tuple[str, np.ndarray]:
  """The split of the data set that the queries are of, and their rows in it."""
  if run.config.eval.split == "validation":
    return "train", run.validation_rows
  return "test", np.arange(len(run.items["test"]))


def _by_images(run: Run, result: Evaluation) -> dict[str, Any]:
  """Of the queries that have images and of those that have none; empty for a model of texts."""
  if run.bank is None:
    return {}
  source, rows = _rows(run)
  has_images = run.items[source].images.lengths[rows] > 0
  groups = {"with images": np.flatnonzero(has_images), "without images": np.flatnonzero(~has_images)}
  return {
    name: result.of_queries(group, run.config.eval.bootstrap_samples) for name, group in groups.items() if len(group)
  }


def _learning_rates(run: Run) -> dict[str, list[tuple[float, float]]]:
  """For each group of parameters the steps at which its rate turns, with the rates there."""
  train = run.config.train
  factor = schedule(train.warmup_steps, run.total_steps)
  peaks = {
    "encoder": train.learning_rate,
    "new parameters": train.new_learning_rate,
    "free vectors": train.free_vector_learning_rate,
  }
  turns = (0, min(train.warmup_steps, run.total_steps), run.total_steps)
  return {name: [(step, peak * float(factor(step))) for step in turns] for name, peak in peaks.items()}
