"""Metrics of training steps: fetched a step late, checked to be finite, averaged over epochs, written and reported."""

from collections.abc import Callable
import logging
import math

import jax

from vixml_jax.errors import StopTraining
from vixml_jax.input.batches import Batch
from vixml_jax.stages import Stage, report_evaluation, report_step
from vixml_jax.training.metric_writer import MetricWriter
from vixml_jax.training.step_checks import BatchRows, CollapseCheck, is_finite

_log = logging.getLogger(__name__)


class StepMetrics:
  """The metrics of a run's steps.

  The metrics of a step are read while the devices compute the next step, so that the host never waits for them.

  Args:
    writer: where metrics go.
    progress: the stage of training; its units are steps.
    steps_per_epoch: batches in an epoch.
    log_every_steps: steps from one written line to the next.
    last_saved: returns the step of the newest checkpoint once everything is on disk; for the error message.
    rows: which rows of the data set a batch consists of; for the error message.

  Attributes:
    stop_asked: whether a callback has raised `StopTraining`.
    epoch_loss: sum and number of the losses of this epoch's steps, which a checkpoint keeps.
  """

  def __init__(
    self,
    writer: MetricWriter,
    progress: Stage,
    steps_per_epoch: int,
    log_every_steps: int,
    last_saved: Callable[[], int | None],
    rows: BatchRows,
  ):
    self.stop_asked = False
    self._writer, self._progress = writer, progress
    self._steps_per_epoch, self._log_every_steps = steps_per_epoch, log_every_steps
    self._last_saved, self._rows, self._collapse = last_saved, rows, CollapseCheck()
    self._pending: tuple[int, dict[str, jax.Array], Batch] | None = None
    self.epoch_loss: tuple[float, int] = (0.0, 0)

  def add(self, step: int, metrics: dict[str, jax.Array], batch: Batch) -> None:
    """Takes the metrics of a step that was started, with its batch, and fetches those of the step before."""
    self.flush()
    self._pending = step, metrics, batch
    self._progress.advance()

  def flush(self) -> None:
    """Fetches the metrics of the last step. A state may only be saved after this: its loss was finite.

    Raises:
      InputError: the loss or the gradient is not finite.
    """
    if self._pending is None:
      return
    step, metrics, batch = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not is_finite(values):
      raise self._rows.not_finite(step, values, batch, self._last_saved())
    self._collapse.add(step, values["query_cosine"])
    total, count = self.epoch_loss
    self.epoch_loss = total + values["loss"], count + 1
    if step % self._log_every_steps == 0:
      self._writer.write(step, (step - 1) // self._steps_per_epoch, "train", values)
    try:
      report_step(step, values)
    except StopTraining as stop:
      self._stop(stop)

  def evaluated(self, step: int, epoch: int, split: str, values: dict[str, float]) -> None:
    """Writes and reports the metrics of an evaluation between epochs."""
    self._writer.write(step, epoch, split, values)
    try:
      report_evaluation(step, values)
    except StopTraining as stop:
      self._stop(stop)

  def end_epoch(self, step: int, epoch: int, train_seconds: float) -> float:
    """Writes and returns the mean loss of the epoch's steps; nan if none of them is known."""
    total, count = self.epoch_loss
    mean = total / count if count else math.nan
    self.epoch_loss = 0.0, 0
    self._writer.write(step, epoch, "epoch", {"mean_loss": mean, "train_seconds": train_seconds})
    return mean

  def _stop(self, reason: StopTraining) -> None:
    self.stop_asked = True
    _log.info("training ends early%s", f": {reason}" if str(reason) else "")
