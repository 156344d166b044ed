"""The number of epochs that fit a time limit, which is chosen when a few steps have been timed."""

from collections.abc import Mapping
import logging
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

_EPOCHS = "epochs"  # Key of a checkpoint's meta: the number of epochs that was chosen.
_UNTIMED, _TIMED = 2, 20  # The first step compiles, and the second one may wait for its batch.
_EPOCH_END = 1.1  # Mining and centroids take a share of an epoch that is not known after the first steps.

_log = logging.getLogger(__name__)


def num_epochs(config: ConfigDict, meta: Mapping[str, Any]) -> int:
  """Returns the number of epochs of a run: that which was chosen for its time limit, or that of its config.

  Args:
    config: the whole config.
    meta: JSON part of a checkpoint of the run.
  """
  return int(meta.get(_EPOCHS, config.train.epochs))


class TimeLimit:
  """Chooses the number of epochs of a run, so that training takes at most `train.minutes`.

  The choice is made once, after 22 steps, and is kept in the checkpoints. It is at most `train.epochs`, and an epoch is
  never cut. Until then, the learning rate follows the schedule of all epochs.

  Args:
    config: the whole config.
    steps_per_epoch: batches in an epoch.
    meta: JSON part of the run's next checkpoint, which receives the choice; its `train_seconds` count.
  """

  def __init__(self, config: ConfigDict, steps_per_epoch: int, meta: dict[str, Any]):
    self._config, self._steps_per_epoch, self._meta = config, steps_per_epoch, meta
    self._began, self._count, self._timed_from = time.monotonic(), 0, 0.0
    self._spent = meta["train_seconds"]

  @property
  def epochs(self) -> int:
    """Number of epochs; until the choice is made, that of the config."""
    return num_epochs(self._config, self._meta)

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.epochs * self._steps_per_epoch

  @property
  def arguments(self) -> tuple[np.ndarray, ...]:
    """Further arguments of the training step, on the host: none if it was made for the steps of the run."""
    return (np.array(self.total_steps, np.int32),) if self._config.train.minutes else ()

  def after(self, step: int, values: Any) -> None:
    """Times a step, and chooses when enough of them are timed.

    Args:
      step: number of the step.
      values: what it returned, on the devices.
    """
    if not self._config.train.minutes or _EPOCHS in self._meta:
      return
    self._count += 1
    if self._count == _UNTIMED:
      jax.block_until_ready(values)
      self._timed_from = time.monotonic()
    elif self._count == _UNTIMED + _TIMED:
      jax.block_until_ready(values)
      now = time.monotonic()
      times = np.array([(now - self._timed_from) / _TIMED, self._spent + now - self._began])
      if jax.process_count() > 1:  # The clocks differ, and all processes must train the same steps.
        times = multihost_utils.broadcast_one_to_all(times)
      self._meta[_EPOCHS] = self._choose(step, *map(float, times))

  def _choose(self, step: int, seconds: float, spent: float) -> int:
    """Returns the number of epochs, given the seconds of a step and those of training so far."""
    train, per_epoch = self._config.train, _EPOCH_END * seconds * self._steps_per_epoch
    begun = -(-step // self._steps_per_epoch)
    fitting = int(step / self._steps_per_epoch + (60 * train.minutes - spent) / per_epoch)
    epochs = min(max(fitting, begun), train.epochs)
    _log.info(
      "train.minutes=%g: a step takes %.3g s, and an epoch about %.3g minutes; epochs of this run: %d of %d",
      train.minutes,
      seconds,
      per_epoch / 60,
      epochs,
      train.epochs,
    )
    if fitting < begun:
      _log.warning("train.minutes=%g: the epoch that has begun takes longer, and is trained to its end", train.minutes)
    return epochs
