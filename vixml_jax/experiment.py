"""Trains and evaluates a run, and writes its outputs: the functions behind `api.train` and the commands."""

from collections.abc import Callable
import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding
from vixml_jax.blend.libraries import check_blend_libraries
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.errors import InputError, StopTraining
from vixml_jax.evaluation.baseline_rows import baseline_rows
from vixml_jax.evaluation.baselines import BaselineTask, check_baselines
from vixml_jax.evaluation.classifier_search import CLASSIFIER_ROW, evaluate_classifiers
from vixml_jax.evaluation.evaluate_model import (
  ModelEvaluation,
  all_label_vectors,
  evaluate_model,
  evaluate_with_fewer_images,
  evaluation_config,
  final_metrics,
  retrieval_settings,
  small_vector_metrics,
)
from vixml_jax.evaluation.shown_queries import shown_queries
from vixml_jax.files import write_json
from vixml_jax.input.batches import steps_per_epoch
from vixml_jax.ragged import Ragged
from vixml_jax.remote import local_data_dir
from vixml_jax.report.label_map import label_map, mapped_labels
from vixml_jax.report.run_report import describe_confusions, results_table, write_evaluation, write_report_files
from vixml_jax.row_files import RowFiles, remove_shares, write_shares
from vixml_jax.run.checkpoint import Checkpointer
from vixml_jax.run.from_config import adapter_folder, model_from_config
from vixml_jax.run.inference_files import image_origin, label_names, query_texts, write_inference_files
from vixml_jax.run.limits import check_limits, not_enough_memory
from vixml_jax.run.pretrained import check_adapter, check_base, trainable_params
from vixml_jax.run.provenance import record_start
from vixml_jax.run.restored_model import newest_model
from vixml_jax.run.run_log import recorded
from vixml_jax.run.setup import RunSetup, set_up_run, write_config
from vixml_jax.run.state import TrainedModel
from vixml_jax.run.workdir import CHECKPOINTS, EMBEDDINGS, FINAL_METRICS, RETRIEVAL_SETTINGS
from vixml_jax.search.label_index_files import IndexContents
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import report_evaluation, stage
from vixml_jax.training.loop import train, training_ended
from vixml_jax.training.optimizer import learning_rates
from vixml_jax.training.time_limit import total_steps
from vixml_jax.training.trackers import Trackers, check_trackers

_log = logging.getLogger(__name__)


@recorded
@not_enough_memory
def train_and_evaluate(
  config: ConfigDict,
  workdir: Path,
  show: Callable[[str], object] = lambda table: None,
  saved: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
  """Trains a run, or continues it, evaluates it and writes all outputs.

  A run is initialized in this order. Each step fails before the next, more expensive one starts.
    1. mesh: the devices, as `data x fsdp x tensor`
    2. pretrained folder: found on disk, in a package or on the hub; pinned hashes are checked
    3. tokenizer and row layout: an item must fit a row
    4. data: the set is prepared where it is missing; image features are opened or extracted; texts are tokenized;
       validation queries are held out
    5. config: sizes that depend on the data are chosen and checked
    6. model definition: shapes and logical axes, no values
    7. workdir: made where it is missing; its `config.json` is compared with the config
    8. the newest checkpoint that is whole: its data and frozen encoder must be those of this run; then `config.json`
       is written
    9. frozen parameters: loaded into their shardings
    10. training queries: items, labels and sampling weights
    11. optimizer, and the train state as shapes with shardings
    12. train state: the newest checkpoint, restored into these shardings, or else step 0: parameters, the free vector
        of each label, label centroids
    13. the jitted training step
    14. `metrics.jsonl` and TensorBoard, continued after the checkpoint's step, and the handler of SIGTERM
  Steps 1 to 7 are `run.setup.set_up_run`, steps 8 and 9 are here, steps 10 to 14 are `training.loop.train`.

  Args:
    config: the whole config, checked by `configuration.check`.
    workdir: folder of the outputs; a run in it is continued.
    show: receives the table of results in the first process, such as `print`.
    saved: called in the first process after every checkpoint, when it is whole on the disk.

  Returns:
    The contents of final_metrics.json.
  """
  _check_libraries(config)
  adapter = adapter_folder(config)
  if adapter is not None and not (workdir / CHECKPOINTS).is_dir():  # A run that is continued has its own adapters.
    check_adapter(model_from_config(config), adapter)
  setup = set_up_run(config, workdir, extract=True)
  check_limits(setup.config, setup.model, setup.mesh, len(setup.data.train_rows), setup.data.num_labels)
  with Checkpointer(workdir / CHECKPOINTS, config.checkpoint.keep, saved) as checkpointer:
    step = checkpointer.step_to_resume()
    if step is not None:
      _check_same_run(setup, workdir, checkpointer.meta(step))
    write_config(setup, workdir)
    encoder = setup.load_encoder()

    def evaluate(model: TrainedModel) -> dict[str, float]:
      return _evaluate(setup, workdir, encoder, model).result.final_metrics()

    model = train(setup.config, workdir, checkpointer, setup.data, encoder, setup.weights_folder, evaluate, step)
  return _evaluate_and_write(setup, workdir, encoder, model, show)


@recorded
@not_enough_memory
def evaluate_workdir(
  config: ConfigDict, workdir: Path, show: Callable[[str], object] = lambda table: None
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a workdir, without training, and writes all outputs.

  Args:
    config: the config of the run, with other settings of evaluation.
    workdir: folder of the run.
    show: receives the table of results in the first process, such as `print`.

  Returns:
    The contents of final_metrics.json.
  """
  _check_libraries(config)
  setup = set_up_run(config, workdir, extract=False)
  model = newest_model(setup, workdir)
  steps = _total_steps(setup, model.meta)
  if not training_ended(model.step, steps, model.meta):
    _log.warning("step %d of %d: training of this run has not finished", model.step, steps)
  write_config(setup, workdir)
  record_start(workdir, model.meta)
  return _evaluate_and_write(setup, workdir, setup.load_encoder(), model, show)


def _check_libraries(config: ConfigDict) -> None:
  """Checks that the optional libraries are installed that evaluation needs."""
  if config.eval.blend or {"tfidf", "plt"} & {*config.eval.baselines}:
    check_blend_libraries()
  check_baselines(config.eval.baselines)
  check_trackers(config)


def _total_steps(setup: RunSetup, meta: dict[str, Any]) -> int:
  """Returns the steps of a run, given the JSON part of one of its checkpoints."""
  return total_steps(setup.config, steps_per_epoch(len(setup.data.train_rows), setup.config.train.batch_size), meta)


def _check_same_run(setup: RunSetup, workdir: Path, meta: dict[str, Any]) -> None:
  """Checks that a checkpoint was trained on the data and the frozen encoder of this run."""
  if meta["data_fingerprint"] != setup.data.fingerprint:
    raise InputError(
      f"{workdir}: its checkpoint was trained on other data than {setup.config.dataset.name} now contains; use another "
      "--workdir"
    )
  check_base(setup.model, setup.weights_folder, workdir, meta)


def _evaluate(setup: RunSetup, workdir: Path, encoder: ItemEncoder, model: TrainedModel) -> ModelEvaluation:
  """Evaluates a model, and writes the retrieval settings that were tried."""
  evaluation = evaluate_model(setup.config, setup.data, encoder, model)
  if evaluation.tried and jax.process_index() == 0:
    write_json(workdir / RETRIEVAL_SETTINGS, [dataclasses.asdict(setting) for setting in evaluation.tried])
  return evaluation


def _evaluate_and_write(
  setup: RunSetup, workdir: Path, encoder: ItemEncoder, model: TrainedModel, show: Callable[[str], object]
) -> dict[str, Any]:
  """Evaluates a model at the end of a run, writes everything, and shows the table."""
  config, data = setup.config, setup.data
  evaluation = _evaluate(setup, workdir, encoder, model)
  fewer_images = evaluate_with_fewer_images(config, data, encoder, model, evaluation)
  compared = _classifiers(evaluation) | _baselines(setup, encoder, model, evaluation)
  small = small_vector_metrics(evaluation, config)
  seconds = model.meta["train_seconds"]
  final = final_metrics(evaluation, small)
  final |= {"train_seconds": seconds, "tokens_per_second": model.meta["tokens"] / max(seconds, 1e-9)}
  split, rows = data.evaluated_queries(config.eval.split)
  shown = shown_queries(evaluation.result, evaluation.index, evaluation.queries, evaluation.config)
  mapped, vectors = _mapped_labels(data.corpus.train_labels, evaluation)
  if jax.process_index() == 0:
    write_evaluation(
      workdir,
      evaluation.result,
      fewer_images,
      split=config.eval.split,
      search=config.eval.search,
      num_labels=data.num_labels,
      has_images=data.items[split].images.lengths[rows] > 0 if config.images else None,
      bootstrap_samples=config.eval.bootstrap_samples,
      baselines=compared,
      confusions=describe_confusions(data.corpus, evaluation.result, evaluation.queries.labels),
      small_vectors=small,
    )
    write_json(workdir / FINAL_METRICS, final)
    write_report_files(
      workdir,
      data.corpus,
      evaluation.result,
      shown,
      label_map(data.corpus, mapped, vectors),
      split=config.eval.split,
      rows=rows,
      propensity=(config.dataset.propensity_a, config.dataset.propensity_b),
      learning_rates=learning_rates(config, _total_steps(setup, model.meta)),
    )
    show(results_table(config.name, evaluation.result, fewer_images, evaluation.config, compared, small))
  _write_embeddings(workdir / EMBEDDINGS, config.eval.split, encoder, model, evaluation)
  _write_for_inference(setup, workdir, evaluation, model)
  with contextlib.suppress(StopTraining):  # Training has ended.
    report_evaluation(model.step, final)
  if jax.process_index() == 0:
    with Trackers(config, workdir) as trackers:
      trackers.log(model.step, "final", final)
  return final


def _mapped_labels(train_labels: Ragged, evaluation: ModelEvaluation) -> tuple[np.ndarray, np.ndarray]:
  """Returns the labels of the report's map, int64 [P], and their vectors [P, D]; all processes call this."""
  vectors = evaluation.index.label_vectors
  mapped = mapped_labels(np.bincount(train_labels.values, minlength=len(evaluation.index.inverse_propensity)))
  assert isinstance(vectors, ShardedRows)
  return mapped, np.asarray(vectors.take(mapped))


def _classifiers(evaluation: ModelEvaluation) -> dict[str, dict[str, float]]:
  """Returns the metrics of the classifiers that the blend reads, as a row that is printed beside the baselines."""
  if evaluation.blend is None or evaluation.blend.classifiers is None:
    return {}
  classifiers, propensity = evaluation.blend.classifiers, evaluation.index.inverse_propensity
  return {CLASSIFIER_ROW: evaluate_classifiers(classifiers, evaluation.queries, propensity, evaluation.config)}


def _baselines(
  setup: RunSetup, encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation
) -> dict[str, dict[str, float]]:
  """Returns the metrics of the baselines that the config computes, and of those that it states.

  A run without training is itself the baseline of the encoder before training.
  """
  config, data = setup.config, setup.data
  stated = {name: dict(values) for name, values in config.baselines.items()}
  names = [name for name in config.eval.baselines if config.train.epochs or name != "untrained"]
  if not names or config.eval.split != "test":
    return stated
  propensity = data.inverse_propensity(config.dataset.propensity_a, config.dataset.propensity_b)
  computed = baseline_rows(
    names,
    config,
    BaselineTask(data, propensity, evaluation_config(config.eval), retrieval_settings(config.eval)),
    encoder,
    model.meta["weights_sha256"],
    lambda: trainable_params(encoder.model, setup.mesh, config.seed, setup.weights_folder, adapter_folder(config)),
    None if evaluation.blend is None else evaluation.blend.words,
  )
  return computed | stated


def _write_embeddings(
  folder: Path, split: str, encoder: ItemEncoder, model: TrainedModel, evaluation: ModelEvaluation
) -> None:
  """Writes the embeddings of labels, training queries and evaluated queries, and the means of the labels' clusters.

  Every process writes the rows that its devices hold. The labels and training queries are all of them, whatever was
  evaluated.
  """
  assert isinstance(evaluation.queries.embeddings, ShardedRows)
  embeddings = {
    "labels": all_label_vectors(encoder, model, evaluation),
    "train_queries": evaluation.train_embeddings,
    f"{split}_queries": evaluation.queries.embeddings,
    "cluster_means": evaluation.cluster_means,
    "classifiers": None if evaluation.blend is None else evaluation.blend.classifiers,
  }
  with stage("write embeddings"):
    if jax.process_index() == 0:
      folder.mkdir(exist_ok=True)
      for name in embeddings:
        remove_shares(folder, name)
    sharding.wait_for_all_processes("old embeddings removed")
    for name, rows in embeddings.items():
      if rows is not None:
        write_shares(folder, name, rows.shape[1], rows.own_shards(), rows.num_shards)
    sharding.wait_for_all_processes("embeddings written")


def _write_for_inference(setup: RunSetup, workdir: Path, evaluation: ModelEvaluation, model: TrainedModel) -> None:
  """Writes tokenizer and label index, which the first process reads from the files of embeddings."""
  config, data, folder = setup.config, setup.data, workdir / EMBEDDINGS
  if jax.process_index() == 0:
    retrieval, blend = evaluation.config.retrieval, None
    if evaluation.blend is not None:
      classifiers = None if evaluation.blend.classifiers is None else RowFiles(folder, "classifiers")
      blend = evaluation.blend.stored(config.dataset.propensity_a, config.dataset.propensity_b, classifiers)
    has_queries = retrieval is not None or blend is not None
    builder = data.corpus.builder
    texts, uids = label_names(builder, data.corpus.text_fields)
    contents = IndexContents(
      RowFiles(folder, "labels"),
      texts,
      uids,
      model.label_clusters,
      # Without free vectors, labels have no clusters, and the index has one without labels.
      RowFiles(folder, "cluster_means")
      if setup.model.has_free_vectors
      else np.zeros((1, setup.model.embed_dim), np.float32),
      queries=RowFiles(folder, "train_queries") if has_queries else None,
      query_labels=data.corpus.train_labels if has_queries else None,
      query_texts=query_texts(builder, data.corpus.text_fields) if has_queries and config.eval.query_texts else None,
      held_out=RowFiles(folder, f"{config.eval.split}_queries"),
      blend=blend,
      without_classifier=None if evaluation.mix is None else evaluation.mix.without_classifier,
    )
    origin = (
      image_origin(builder, local_data_dir(config.dataset.data_dir), config.features.name) if config.images else None
    )
    with stage("write the label index"):
      write_inference_files(
        workdir,
        model.step,
        contents,
        tokenizer_folder=setup.pretrained,
        image_features=origin,
        search=config.eval.search,
        scann_recall=config.eval.scann_recall,
        retrieval=None if retrieval is None else retrieval.as_json(),
      )
  sharding.wait_for_all_processes("inference files written")
