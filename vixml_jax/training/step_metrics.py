"""Metrics of training steps: fetched one step late, checked to be finite, averaged over the epoch, written."""

from collections.abc import Callable
import logging
import math

import jax
import numpy as np
from tqdm import tqdm

from vixml_jax.errors import InputError
from vixml_jax.training.metric_writer import MetricWriter

_log = logging.getLogger(__name__)


class StepMetrics:
  """The metrics of a run's steps.

  The metrics of a step are read while the devices compute the next step, so that the host never waits for them.

  Args:
    writer: where metrics go.
    progress: progress bar of the run; its total is the number of steps.
    steps_per_epoch: batches in an epoch.
    log_every_steps: steps from one written line to the next.
    last_saved: returns the step of the newest checkpoint once everything is on disk; for the error message.
  """

  def __init__(
    self,
    writer: MetricWriter,
    progress: tqdm,
    steps_per_epoch: int,
    log_every_steps: int,
    last_saved: Callable[[], int | None],
  ):
    self._writer, self._progress = writer, progress
    self._steps_per_epoch, self._log_every_steps = steps_per_epoch, log_every_steps
    self._last_saved = last_saved
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._losses: list[float] = []

  def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of a step that was started, and fetches those of the step before."""
    self.flush()
    self._pending = step, metrics
    self._progress.update()

  def flush(self) -> None:
    """Fetches the metrics of the last step. A state may only be saved after this: its loss was finite.

    Raises:
      InputError: the loss or the gradient is not finite.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
      raise InputError(
        f"step {step}: the loss is {values['loss']} and the gradient norm {values['gradient_norm']}; the last good "
        f"checkpoint is of step {self._last_saved()}; lower train.learning_rate and start again"
      )
    self._losses.append(values["loss"])
    if step % self._log_every_steps == 0:
      self._writer.write(step, (step - 1) // self._steps_per_epoch, "train", values)
      if self._progress.disable:
        _log.info("step %d of %d: loss %.4f", step, self._progress.total, values["loss"])
    self._progress.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

  def epoch_mean_loss(self) -> float:
    """Returns the mean loss of the epoch's steps in this process, and starts the next epoch; nan without steps."""
    mean = float(np.mean(self._losses)) if self._losses else math.nan
    self._losses = []
    return mean
