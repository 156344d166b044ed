"""The training loop: epochs of steps, with query clusters and label centroids refreshed between epochs."""

from collections.abc import Callable, Mapping
import contextlib
import dataclasses
import functools
import logging
from pathlib import Path
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from vixml_jax import sharding, stopping
from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.encoding.item_encoder import ItemEncoder
from vixml_jax.input.batches import TrainingQueries, make_batch, steps_per_epoch
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.order import cluster_size_at, epoch_order, is_cluster_update
from vixml_jax.mining.sampler import query_clusters
from vixml_jax.prefetch import prefetched
from vixml_jax.ragged import Ragged
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer
from vixml_jax.run.data import RunData
from vixml_jax.run.from_config import state_from_config
from vixml_jax.run.goodput import current_shares
from vixml_jax.run.provenance import record_start
from vixml_jax.run.state import TrainedModel, TrainState, model_part, trained_model
from vixml_jax.sharded_rows import ShardedRows
from vixml_jax.stages import stage
from vixml_jax.training.metric_writer import MetricWriter
from vixml_jax.training.preemption import Preemption
from vixml_jax.training.start import initial_checkpoint
from vixml_jax.training.step import device_batch, make_train_step, step_config
from vixml_jax.training.step_checks import BatchRows
from vixml_jax.training.step_metrics import StepMetrics
from vixml_jax.training.step_profiler import StepProfiler
from vixml_jax.training.time_limit import TimeLimit
from vixml_jax.training.trackers import Trackers

_log = logging.getLogger(__name__)
# Keys of a checkpoint's meta.
_ENDED_EARLY = "ended_early"
_EPOCH_END_DUE = "epoch_end_due"  # What follows the last step of an epoch is still to be done.
_EPOCH_LOSS = "epoch_loss"  # Sum and number of the losses of the epoch in progress.


def train(
  config: ConfigDict,
  workdir: Path,
  checkpointer: Checkpointer,
  data: RunData,
  encoder: ItemEncoder,
  weights_folder: Path | None,
  evaluate: Callable[[TrainedModel], dict[str, float]],
  step: int | None,
) -> TrainedModel:
  """Trains to the end, from a checkpoint if there is one.

  Everything random is a function of the seed and the step, and a checkpoint holds all else. A run that was killed and
  started again therefore ends with the same parameters to the bit on the same topology.

  What follows the last step of an epoch (clusters, centroids, evaluation) is a function of the state after that step. A
  checkpoint of such a step is saved before, if it is long: a run that is stopped meanwhile repeats it without training
  any step again. The end of the run replaces this checkpoint.

  Training is initialized by steps 10 to 14 of the list in `experiment.train_and_evaluate`. If a callback raises
  `StopTraining`, training ends as after the last epoch, and the run that is started again does not train any further.

  Args:
    config: the whole config.
    workdir: folder of the run.
    checkpointer: saves and restores the run's checkpoints.
    data: the data set.
    encoder: encodes items, given the trained parameters.
    weights_folder: folder of the pretrained encoder; None for a random encoder.
    evaluate: returns the metrics of a model; called after every `eval.every_epochs` epochs but the last.
    step: step of the checkpoint to continue from; None to start.

  Returns:
    The model of the last step. Its centroids, if the method has any, come from a fresh encoding of all training
    queries.

  Raises:
    Preempted: after SIGTERM, when the run has been saved.
    KeyboardInterrupt: after Ctrl-C, when the run has been saved.
    InputError: the loss is not finite; the last good checkpoint is kept.
  """
  mesh = encoder.mesh
  queries = training_queries(config, data)
  num_steps = steps_per_epoch(len(queries), config.train.batch_size)
  how = step_config(config, encoder.model, encoder.layout, config.train.epochs * num_steps, data.num_labels)
  abstract = state_from_config(config, encoder.model, how.optimizer, len(queries), data.num_labels, mesh)

  has_steps = config.train.epochs > 0
  if step is None:
    checkpoint = initial_checkpoint(
      config, abstract, how.optimizer, queries, encoder, weights_folder, data.fingerprint, has_steps=has_steps
    )
  else:
    checkpoint = checkpointer.restore(step, abstract, len(queries))
  meta = dict(checkpoint.meta)
  limit = TimeLimit(config, num_steps, meta)
  if step is not None:
    _log.info("resuming at step %d of %d", step, limit.total_steps)
  end_is_saved = step is not None and training_ended(step, limit.total_steps, meta)
  step, state, clusters = step or 0, checkpoint.state, checkpoint.query_clusters
  record_start(workdir, meta)
  ended, train_embeddings = step == limit.total_steps or meta.get(_ENDED_EARLY, False), None
  epoch_end_due = meta.pop(_EPOCH_END_DUE, False)

  step_fn = make_train_step(how, abstract, mesh)
  stopping.has_saved(f"step {step} is saved" if step else "no step is saved")

  def save() -> None:
    metrics.flush()  # A state is good only if its loss is finite.
    writer.sync()
    due = {_EPOCH_END_DUE: True} if epoch_end_due else {}
    with stage("save a checkpoint", logged=False):
      checkpointer.save(step, Checkpoint(state, clusters, meta | due | {_EPOCH_LOSS: metrics.epoch_loss}))
    stopping.is_saving("steps", False)

  def save_or_stop(*, wanted: bool = False) -> bool:
    """Saves a checkpoint where one is due, and returns whether it did."""
    asked = preemption.asked(step)
    wanted = wanted or asked or step % config.checkpoint.every_steps == 0
    if wanted:
      save()
    if asked:
      stopping.is_saving("steps", True)  # Until the block of `Preemption` ends.
      checkpointer.wait()
      sharding.wait_for_all_processes("the last step is saved")  # The first one hashes it.
      raise preemption.error(step)
    return wanted

  with (
    MetricWriter(workdir, step, lambda: Trackers(config, workdir), epoch_end_due=epoch_end_due) as writer,
    StepProfiler(workdir, config.profile.steps) as profiler,
    stage("train", total=limit.total_steps, unit="step", done=step, logged=False) as progress,
    Preemption(checkpointer.reached_preemption) as preemption,
  ):
    rows = BatchRows(config, workdir, data.train_rows)
    metrics = StepMetrics(writer, progress, num_steps, config.train.log_every_steps, checkpointer.last_saved, rows)
    metrics.epoch_loss = tuple(meta.pop(_EPOCH_LOSS, metrics.epoch_loss))
    while not ended or epoch_end_due:
      started = time.monotonic()
      epoch, first = divmod(step, num_steps)
      if epoch_end_due:
        epoch, first, saved = (step - 1) // num_steps, num_steps, True
      order = epoch_order(config.seed, epoch, len(queries), clusters)
      make = functools.partial(
        make_batch, queries, order, config.train.batch_size, encoder.layout, seed=config.seed, epoch=epoch
      )
      made = (make(step=number) for number in range(first, num_steps))
      with contextlib.closing(prefetched(made, "batches")) as batches:
        for batch in batches:
          on_mesh = device_batch(batch, encoder.features, mesh)
          profiler.before(step + 1)
          arguments = [sharding.to_global(value, sharding.named_sharding(mesh)) for value in limit.arguments]
          with jax.transfer_guard("disallow"):
            state, values = step_fn(state, encoder.frozen, on_mesh, *arguments)
          step += 1
          limit.after(step, values)
          progress.total = limit.total_steps
          profiler.after(step, values)
          stopping.is_saving("steps", True)
          meta["tokens"] += batch.items.num_tokens
          metrics.add(step, values, batch)
          if metrics.stop_asked or step == limit.total_steps:
            break
          if step % num_steps:  # After the last step of an epoch, more is to be done.
            meta["train_seconds"] += time.monotonic() - started
            save_or_stop()
            started = time.monotonic()

      metrics.flush()
      if metrics.stop_asked and step < limit.total_steps:
        meta[_ENDED_EARLY] = True
      ended = step == limit.total_steps or meta.get(_ENDED_EARLY, False)
      is_evaluated = _is_evaluated(config, epoch) and not ended
      if not epoch_end_due:
        epoch_end_due = True
        meta["train_seconds"] += time.monotonic() - started
        saved = save_or_stop(wanted=ended or is_evaluated)
        stopping.is_saving("steps", False)  # The end of the epoch trains nothing.
        started = time.monotonic()
      with preemption.at_once(step) if saved else contextlib.nullcontext():
        if not meta.get(_ENDED_EARLY):
          clusters = _refreshed_clusters(config, state, clusters, len(queries), epoch)
        if ended:
          state, train_embeddings = _with_final_centroids(encoder, state, data)
        else:
          state = _with_centroids(encoder, state, state.bank, queries.labels, data.num_labels)
        meta["train_seconds"] += time.monotonic() - started
        loss = metrics.end_epoch(step, epoch, meta["train_seconds"])
        if shares := current_shares():
          writer.write(step, epoch, "goodput", shares)
        _log.info("epoch %d of %d: mean loss %.4f", epoch + 1, limit.epochs, loss)
        if is_evaluated:
          model = trained_model(step, meta, model_part(state), data.num_labels)
          metrics.evaluated(step, epoch, config.eval.split, evaluate(model))
          if metrics.stop_asked:
            ended, meta[_ENDED_EARLY] = True, True
            state, train_embeddings = _with_final_centroids(encoder, state, data)
      epoch_end_due = False

    if not has_steps:
      state, train_embeddings = _with_final_centroids(encoder, state, data)
    if not end_is_saved:
      save()
  checkpointer.wait()
  return trained_model(step, meta, model_part(state), data.num_labels, train_embeddings)


def training_ended(step: int, total_steps: int, meta: Mapping[str, Any]) -> bool:
  """Returns whether a checkpoint is the end of its run: after the last step, or where a callback ended it.

  Args:
    step: the checkpoint's step.
    total_steps: steps of a run that no callback ends.
    meta: JSON part of the checkpoint.
  """
  return (step == total_steps or meta.get(_ENDED_EARLY, False)) and not meta.get(_EPOCH_END_DUE, False)


def _with_final_centroids(encoder: ItemEncoder, state: TrainState, data: RunData) -> tuple[TrainState, ShardedRows]:
  """Returns the state with centroids from a fresh encoding of all training queries, and their embeddings.

  Where the bank has a row for each of them, in float32, it receives the embeddings: no other memory is needed.
  """
  if encoder.model.has_centroids:
    state.centroids.delete()  # Frees the memory for the embeddings.
  items = data.items["train"]
  fits = len(data.train_rows) == len(items) and state.bank.dtype == np.float32
  embeddings = encoder.embed_rows(state.params, items, "training queries", into=state.bank if fits else None)
  if fits:
    state = dataclasses.replace(state, bank=embeddings.values)
  state = _with_centroids(encoder, state, embeddings.values, data.corpus.train_labels, data.num_labels)
  return state, embeddings


def _with_centroids(
  encoder: ItemEncoder, state: TrainState, embeddings: jax.Array, labels: Ragged, num_labels: int
) -> TrainState:
  """Returns the state with the label centroids of embedded queries, if the method has centroids."""
  if not encoder.model.has_centroids:
    return state
  if not state.centroids.is_deleted():
    state.centroids.delete()  # Frees the memory for the new ones.
  return dataclasses.replace(state, centroids=label_centroids(embeddings, labels, num_labels))


def training_queries(config: ConfigDict, data: RunData) -> TrainingQueries:
  """Returns the queries that batches are drawn from, with the sampling weights of their labels."""
  labels, train = data.train_labels, config.train
  if train.positive_sampling == "uniform":
    weights = np.ones(data.num_labels)
  else:
    frequencies = np.bincount(labels.values, minlength=data.num_labels)
    weights = inverse_propensity(frequencies, len(labels), train.sampling_a, train.sampling_b)
  dropout = config.fusion.modality_dropout if config.images else 0.0
  return TrainingQueries(
    data.train_items, labels, data.items["labels"], weights, dropout, lists_positives=train.classifier_weight > 0
  )


def _refreshed_clusters(
  config: ConfigDict, state: TrainState, clusters: np.ndarray | None, num_queries: int, epoch: int
) -> np.ndarray | None:
  """Returns the query clusters after an epoch: new ones where an update is due (NGAME, arXiv 2207.04452)."""
  mining = config.mining
  if not is_cluster_update(epoch, mining.start_epoch, mining.update_epochs):
    return clusters
  size = cluster_size_at(epoch, mining.cluster_size, tuple(mining.doubling_epochs))
  return query_clusters(state.bank, num_queries, size, config.seed + epoch)


def _is_evaluated(config: ConfigDict, epoch: int) -> bool:
  every = config.eval.every_epochs
  return bool(every) and (epoch + 1) % every == 0
