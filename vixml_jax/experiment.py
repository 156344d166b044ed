"""Trains and evaluates a config: what `main` and `evaluate` call."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.encoding.item_encoder import normalize
from vixml_jax.errors import InputError
from vixml_jax.evaluation.evaluator import (
  Evaluation,
  EvaluationConfig,
  IndexedMemory,
  Memory,
  Queries,
  choose_setting,
  evaluate,
)
from vixml_jax.evaluation.metrics import inverse_propensity
from vixml_jax.files import write_json
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.report.report_files import describe, write_report_files
from vixml_jax.report.table import metrics_table
from vixml_jax.run import configuration
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.from_config import Run, adapter_folder, model_of, set_up
from vixml_jax.run.inference_files import write_inference_files
from vixml_jax.run.pretrained import check_adapter
from vixml_jax.run.state import TrainState
from vixml_jax.run.workdir import CHECKPOINTS, EMBEDDINGS
from vixml_jax.training.loop import train
from vixml_jax.training.start import check_base, cluster_means
from vixml_jax.typing import Tree

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
  """What evaluation needs of a checkpoint: trained parameters, centroids [L, D], and each label's free vector [L]."""

  params: Tree
  centroids: np.ndarray
  label_clusters: np.ndarray


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Trains (or goes on), evaluates, writes all outputs and prints the table.

  Returns:
    What final_metrics.json holds.
  """
  adapter = adapter_folder(config)
  if adapter is not None and not (workdir / CHECKPOINTS).is_dir():  # A run that goes on has its adapters.
    check_adapter(model_of(config), adapter)
  run = _set_up_in(config, workdir)
  checkpoint = train(run, lambda state: _evaluate(run, _trained(run, state)).result.final_metrics())
  return _finish(run, _trained(run, checkpoint.state), run.total_steps, checkpoint.meta)


def evaluate_workdir(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a workdir again, without training."""
  run = _set_up_in(config, workdir, extract=False)
  with Checkpointer(workdir / CHECKPOINTS, config.checkpoint.keep) as checkpointer:
    step = checkpointer.latest_step()
    if step is None:
      raise InputError(f"{workdir / CHECKPOINTS}: holds no checkpoint; train first")
    if step < run.total_steps:
      _log.warning("step %d of %d: this run has not ended", step, run.total_steps)
    meta = checkpointer.meta(step)
    check_base(run.model, run.weights_folder, run.workdir, meta)
    restored = checkpointer.restore_model(step, run.abstract)
  labels = run.corpus.num_labels
  model = TrainedModel(
    restored["params"],
    sharding.to_host(restored["centroids"])[:labels],
    sharding.to_host(restored["label_clusters"])[:labels],
  )
  return _finish(run, model, step, meta)


def _set_up_in(config: ConfigDict, workdir: Path, extract: bool = True) -> Run:
  run = set_up(config, workdir, extract)
  _check_held_out(run)
  if jax.process_index() == 0:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"{workdir}: cannot be made ({error.strerror}); give another --workdir") from error
    configuration.write(run.config, workdir / "config.json")
  return run


def _check_held_out(run: Run) -> None:
  """Refuses, before any time is spent, to choose or evaluate on held-out queries of which there are none."""
  data, wanted = run.config.dataset, run.config.eval
  choose = wanted.retrieval_augmented and wanted.retrieval_choose
  if (choose or wanted.split == "validation") and not len(run.validation_rows):
    raise InputError(
      f"config.dataset.validation_fraction={data.validation_fraction}: holds out none of the "
      f"{len(run.corpus.train_tokens)} training queries of {data.name}; raise it, or set "
      "config.eval.retrieval_choose=False and config.eval.split=test"
    )


def _trained(run: Run, state: TrainState) -> TrainedModel:
  labels = run.corpus.num_labels
  return TrainedModel(
    state.params, sharding.to_host(state.centroids)[:labels], sharding.to_host(state.label_clusters)[:labels]
  )


@dataclasses.dataclass(frozen=True)
class _Evaluated:
  """A result with how it was reached, what was searched for what, and embeddings of which more is made.

  `pooled_labels` [L, D] are encoder outputs before the norm; `train_queries` [N, D] are those of all training queries.
  """

  result: Evaluation
  config: EvaluationConfig
  indexed: IndexedMemory
  queries: Queries
  pooled_labels: np.ndarray
  train_queries: np.ndarray


def _evaluate(run: Run, model: TrainedModel) -> _Evaluated:
  """Encodes everything, chooses retrieval settings where asked to, and evaluates the split."""
  corpus, encoder, config = run.corpus, run.encoder, run.config.eval
  evaluation = EvaluationConfig(
    ks=tuple(config.ks),
    recall_ks=tuple(config.recall_ks),
    bootstrap_samples=config.bootstrap_samples,
    retrieval_augmented=config.retrieval_augmented,
    retrieval_hits=config.retrieval_hits,
    retrieval_lambda=config.retrieval_lambda,
    retrieval_temperature=config.retrieval_temperature,
  )
  train_embeddings = encoder.queries(model.params, run.items["train"], "training queries")
  pooled = encoder.pooled(model.params, run.items["labels"], "labels")
  choose = config.retrieval_augmented and config.retrieval_choose
  if choose or config.split == "validation":
    indexed, queries = _held_out(run, model, train_embeddings, pooled)
  if choose:
    evaluation = _with_chosen_setting(run, indexed, queries, evaluation)
  if config.split == "test":
    prototypes = encoder.prototypes_of(model.params, pooled, model.label_clusters, model.centroids)
    memory = Memory(prototypes, train_embeddings, corpus.train_labels, _propensity(run))
    indexed = IndexedMemory(memory, config.search, run.mesh)
    queries = Queries(
      encoder.queries(model.params, run.items["test"], "test queries"), corpus.test_labels, corpus.test_filter
    )
  return _Evaluated(evaluate(indexed, queries, evaluation), evaluation, indexed, queries, pooled, train_embeddings)


def _with_fewer_images(run: Run, model: TrainedModel, evaluated: _Evaluated) -> dict[int, Evaluation]:
  """The same queries with no more than each number of images of `eval.test_images`."""
  items = run.items["test"] if run.config.eval.split == "test" else run.items["train"].take(run.validation_rows)
  results = {}
  for count in run.config.eval.test_images:
    embeddings = run.encoder.queries(model.params, items.first_images(count), f"queries with {count} images")
    queries = dataclasses.replace(evaluated.queries, embeddings=embeddings)
    results[count] = evaluate(evaluated.indexed, queries, evaluated.config)
  return results


def _held_out(
  run: Run, model: TrainedModel, train_embeddings: np.ndarray, pooled: np.ndarray
) -> tuple[IndexedMemory, Queries]:
  """The held-out queries, and a memory and centroids that do not know them."""
  corpus, rows = run.corpus, run.validation_rows
  known = train_embeddings[run.query_rows]
  centroids = sharding.to_host(label_centroids(known, run.queries.labels, corpus.num_labels, mesh=run.mesh))
  prototypes = run.encoder.prototypes_of(model.params, pooled, model.label_clusters, centroids)
  memory = Memory(prototypes, known, run.queries.labels, _propensity(run))
  indexed = IndexedMemory(memory, run.config.eval.search, run.mesh)
  return indexed, Queries(train_embeddings[rows], corpus.train_labels.take(rows), corpus.train_filter.take(rows))


def _with_chosen_setting(
  run: Run, indexed: IndexedMemory, held_out: Queries, evaluation: EvaluationConfig
) -> EvaluationConfig:
  """Chooses lambda and temperature on the held-out queries."""
  best, settings = choose_setting(indexed, held_out, evaluation)
  if jax.process_index() == 0:
    write_json(run.workdir / "retrieval_settings.json", [dataclasses.asdict(setting) for setting in settings])
    _log.info(
      "retrieval augmentation: lambda %g and temperature %g, best of %d on %d held-out queries",
      best.lambda_,
      best.temperature,
      len(settings),
      len(held_out.labels),
    )
  return dataclasses.replace(evaluation, retrieval_lambda=best.lambda_, retrieval_temperature=best.temperature)


def _finish(run: Run, model: TrainedModel, step: int, meta: dict[str, Any]) -> dict[str, Any]:
  """Evaluates, writes and prints."""
  evaluated = _evaluate(run, model)
  fewer = _with_fewer_images(run, model, evaluated)
  seconds = meta["train_seconds"]
  final = evaluated.result.final_metrics()
  if evaluated.config.retrieval_augmented:
    final |= {"RA/lambda": evaluated.config.retrieval_lambda, "RA/temperature": evaluated.config.retrieval_temperature}
  final |= {"train_seconds": seconds, "tokens_per_second": meta["tokens"] / max(seconds, 1e-9)}
  if jax.process_index() == 0:
    _write(run, final, evaluated, fewer)
    write_report_files(run, evaluated.result, evaluated.queries)
    print(_table(run, evaluated, fewer), flush=True)
  _write_for_inference(run, model, step, evaluated)
  return final


def _write_for_inference(run: Run, model: TrainedModel, step: int, evaluated: _Evaluated) -> None:
  """The tokenizer and the label index, which knows all training queries whatever was evaluated."""
  config, pooled = evaluated.config, evaluated.pooled_labels
  prototypes = evaluated.indexed.memory.prototypes
  if run.config.eval.split != "test":
    prototypes = run.encoder.prototypes_of(model.params, pooled, model.label_clusters, model.centroids)
  means = cluster_means(normalize(pooled), model.label_clusters, run.config.train.free_vectors, run.mesh)
  retrieval = {
    "lambda": config.retrieval_lambda,
    "temperature": config.retrieval_temperature,
    "hits": config.retrieval_hits,
  }
  write_inference_files(
    run,
    step,
    retrieval if config.retrieval_augmented else None,
    prototypes,
    model.label_clusters,
    sharding.to_host(means),
    evaluated.train_queries,
  )


def _propensity(run: Run) -> np.ndarray:
  """Inverse propensities over all training queries, as they are published."""
  corpus, data = run.corpus, run.config.dataset
  frequencies = np.bincount(corpus.train_labels.values, minlength=corpus.num_labels)
  return inverse_propensity(frequencies, len(corpus.train_labels), data.propensity_a, data.propensity_b)


def _write(run: Run, final: dict[str, Any], evaluated: _Evaluated, fewer: dict[int, Evaluation]) -> None:
  folder, memory, result = run.workdir / EMBEDDINGS, evaluated.indexed.memory, evaluated.result
  folder.mkdir(exist_ok=True)
  embeddings = {
    "labels": memory.prototypes,
    "train_queries": memory.queries,
    f"{run.config.eval.split}_queries": evaluated.queries.embeddings,
  }
  for name, values in embeddings.items():
    np.save(folder / f"{name}.npy", values)
  write_json(
    run.workdir / "evaluation.json",
    describe(run, result)
    | {
      "intervals_95": result.intervals,
      "by_label_frequency": result.deciles,
      "scann_recall": result.scann_recall,
      "by_test_images": {
        count: {"metrics": other.final_metrics(), "intervals_95": other.intervals} for count, other in fewer.items()
      },
    },
  )
  write_json(run.workdir / "final_metrics.json", final)


def _table(run: Run, evaluated: _Evaluated, fewer: dict[int, Evaluation]) -> str:
  config, result = evaluated.config, evaluated.result
  retrieval = f"+ retrieval (lambda {config.retrieval_lambda:g}, T {config.retrieval_temperature:g})"
  rows: dict[str, dict[str, float]] = {}
  intervals = {}
  named = {run.config.name: result} | {
    f"at most {count} image{'' if count == 1 else 's'} a query": other for count, other in fewer.items()
  }
  for name, other in named.items():
    below = retrieval if other is result else f"{name} {retrieval.split(' (')[0]}"
    rows |= {name: other.plain} | ({below: other.augmented} if other.augmented else {})
    intervals |= {name: other.intervals["plain"], below: other.intervals.get("augmented", {})}
  baselines = {row: dict(values) for row, values in run.config.baselines.items()}
  table = metrics_table(rows, baselines=baselines or None, intervals=intervals)
  found = ", ".join(f"{key} {value:.1f}" for key, value in result.scann_recall.items())
  return f"{table}\nScaNN against exact search: {found}" if found else table
