"""The training loop: restore or start, epochs of steps, mining and centroids between them, checkpoints."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import logging
import math
import signal
import time

import jax
import numpy as np
from tqdm import tqdm

from vixml_jax.errors import InputError, Preempted
from vixml_jax.input.batches import make_batch
from vixml_jax.mining.centroids import label_centroids
from vixml_jax.mining.kmeans import balanced_kmeans
from vixml_jax.mining.order import cluster_size_at, epoch_order, is_cluster_update, num_query_clusters
from vixml_jax.run.checkpoint import Checkpoint, Checkpointer
from vixml_jax.run.from_config import Run
from vixml_jax.run.state import TrainState, padded_like
from vixml_jax.training.metric_writer import MetricWriter
from vixml_jax.training.start import check_base, start
from vixml_jax.training.step import device_batch, make_train_step

_log = logging.getLogger(__name__)


def train(run: Run, evaluate: Callable[[TrainState], dict[str, float]]) -> Checkpoint:
  """Trains to the end, from the newest checkpoint if there is one.

  Everything random is a function of the seed and the step, and a checkpoint holds all else, so a run
  that was killed and started again ends with the same parameters to the bit on the same topology.

  Args:
    run: what to train.
    evaluate: metrics of a state, called after every `eval.every_epochs` epochs.

  Returns:
    The last checkpoint: parameters, fresh centroids, and `meta` with the seconds and tokens trained.

  Raises:
    Preempted: after SIGTERM, when the run has been saved.
    InputError: when the loss is not finite; the last good checkpoint is kept.
  """
  with Checkpointer(run.workdir / "checkpoints", run.config.checkpoint.keep) as checkpointer:
    return _Trainer(run, checkpointer, evaluate).train()


class _Trainer:
  """The state of a run between two steps."""

  def __init__(self, run: Run, checkpointer: Checkpointer, evaluate: Callable[[TrainState], dict[str, float]]):
    self.run = run
    self.checkpointer = checkpointer
    self.evaluate = evaluate
    checkpoint = self._restore() or start(run)
    self.state = checkpoint.state
    self.query_clusters = checkpoint.query_clusters
    self.meta = checkpoint.meta
    self.step = int(jax.device_get(self.state.step))
    self.step_fn = make_train_step(
      run.abstract,
      model=run.model,
      optimizer=run.optimizer,
      layout=run.layout,
      loss_config=run.loss,
      base_key=run.base_key,
      remat=run.config.train.remat,
      mesh=run.mesh,
    )
    self.pending: tuple[int, dict[str, jax.Array]] | None = None
    self.epoch_losses: list[float] = []
    self.stop_asked = False

  def train(self) -> Checkpoint:
    run = self.run
    # Several processes must stop at the same step: the handler of jax.distributed sees to that, and stays.
    alone = jax.process_count() == 1
    previous = signal.signal(signal.SIGTERM, self._on_sigterm) if alone else None
    self.writer = MetricWriter(run.workdir, self.step)
    try:
      with tqdm(total=run.total_steps, initial=self.step, desc="train", unit="step", disable=None) as self.progress:
        while self.step < run.total_steps:
          self._train_epoch(self.step // run.steps_per_epoch)
      if self.checkpointer.latest_step() != self.step:
        self._save()
      self.checkpointer.wait()
    finally:
      self.writer.close()
      if alone:
        signal.signal(signal.SIGTERM, previous)
    return self._checkpoint()

  def _train_epoch(self, epoch: int) -> None:
    """The rest of an epoch, and the work between it and the next."""
    run, config = self.run, self.run.config
    order = epoch_order(config.seed, epoch, len(run.queries), self.query_clusters)
    first = self.step % run.steps_per_epoch

    def batch_of(step):
      return make_batch(
        run.queries, order, config.train.batch_size, run.layout, seed=config.seed, epoch=epoch, step=step
      )

    started = time.monotonic()
    with ThreadPoolExecutor(1, "batches") as pool:
      future = pool.submit(batch_of, first)
      for step in range(first, run.steps_per_epoch):
        batch = future.result()
        if step + 1 < run.steps_per_epoch:
          future = pool.submit(batch_of, step + 1)
        self.state, metrics = self.step_fn(self.state, run.frozen, device_batch(batch, run.mesh, run.bank))
        self.step += 1
        self.meta["tokens"] += batch.items.num_tokens
        self._fetch_pending()
        self.pending = (self.step, metrics)
        if step + 1 == run.steps_per_epoch:
          self._fetch_pending()
          self._end_epoch(epoch)
        self.meta["train_seconds"] += time.monotonic() - started
        if step + 1 == run.steps_per_epoch:
          self._evaluate(epoch)
        started = time.monotonic()
        if self.step % config.checkpoint.every_steps == 0:
          self._save()
        self._stop_if_asked()
        self.progress.update()

  def _end_epoch(self, epoch: int) -> None:
    """Refreshes query clusters when they are due, and label centroids always."""
    run, mining = self.run, self.run.config.mining
    num_queries = len(run.queries)
    if is_cluster_update(epoch, mining.start_epoch, mining.update_epochs):
      size = cluster_size_at(epoch, mining.cluster_size, tuple(mining.doubling_epochs))
      self.query_clusters = balanced_kmeans(
        self.state.bank,
        num_query_clusters(num_queries, size),
        seed=run.config.seed + epoch,
        mesh=run.mesh,
        num_rows=num_queries,
      )
    if self.step == run.total_steps:
      centroids = fresh_centroids(run, self.state)
    else:
      centroids = label_centroids(self.state.bank, run.queries.labels, run.corpus.num_labels, mesh=run.mesh)
    self.state = dataclasses.replace(self.state, centroids=padded_like(centroids, self.state.centroids))
    loss = float(np.mean(self.epoch_losses)) if self.epoch_losses else math.nan
    self.epoch_losses = []
    values = {"mean_loss": loss, "train_seconds": self.meta["train_seconds"]}
    self.writer.write(self.step, epoch, "epoch", values)
    _log.info("epoch %d of %d: mean loss %.4f", epoch + 1, run.config.train.epochs, loss)

  def _evaluate(self, epoch: int) -> None:
    every = self.run.config.eval.every_epochs
    if every and (epoch + 1) % every == 0 and self.step < self.run.total_steps:
      self.writer.write(self.step, epoch, self.run.config.eval.split, self.evaluate(self.state))

  def _fetch_pending(self) -> None:
    """Reads the metrics of the step before: the device already works on the next one."""
    if self.pending is None:
      return
    step, metrics = self.pending
    self.pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
      self.checkpointer.wait()
      raise InputError(
        f"step {step}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}; the last good "
        f"checkpoint is of step {self.checkpointer.latest_step()}; lower train.learning_rate and start again"
      )
    self.epoch_losses.append(values["loss"])
    if step % self.run.config.train.log_every_steps == 0:
      self.writer.write(step, (step - 1) // self.run.steps_per_epoch, "train", values)
      if self.progress.disable:
        _log.info("step %d of %d: loss %.4f", step, self.run.total_steps, values["loss"])
    self.progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

  def _checkpoint(self) -> Checkpoint:
    return Checkpoint(self.state, self.query_clusters, dict(self.meta))

  def _save(self) -> None:
    self._fetch_pending()  # A state is good only when its loss is finite.
    self.checkpointer.save(self.step, self._checkpoint())

  def _on_sigterm(self, *_) -> None:
    self.stop_asked = True

  def _stop_if_asked(self) -> None:
    alone = jax.process_count() == 1
    if self.stop_asked if alone else self.checkpointer.reached_preemption(self.step):
      self._save()
      self.checkpointer.wait()
      raise Preempted(f"saved step {self.step}; start the same command again to go on")

  def _restore(self) -> Checkpoint | None:
    run = self.run
    step = self.checkpointer.latest_step()
    if step is None:
      return None
    checkpoint = self.checkpointer.restore(step, run.abstract, len(run.queries))
    if checkpoint.meta["data_fingerprint"] != run.data_fingerprint:
      raise InputError(
        f"{run.workdir}: its checkpoint was trained on other data than {run.config.dataset.name} holds "
        "now; use another --workdir"
      )
    check_base(run.model, run.weights_folder, run.workdir, checkpoint.meta)
    _log.info("resuming at step %d of %d", step, run.total_steps)
    return checkpoint


def fresh_centroids(run: Run, state: TrainState) -> jax.Array:
  """float32 [L, D], label centroids from a fresh encoding of every training query, held-out ones too."""
  embeddings = run.encoder.queries(state.params, run.items["train"], "training queries")
  return label_centroids(embeddings, run.corpus.train_labels, run.corpus.num_labels, mesh=run.mesh)
