"""The number of steps that fit a time limit, which is chosen when a few steps have been timed."""

from collections.abc import Mapping
import logging
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
import numpy as np

_STEPS = "steps_of_time_limit"  # Key of a checkpoint's meta: the number of steps that was chosen.
_UNTIMED, _TIMED = 2, 20  # The first step compiles, and the second one may wait for its batch.
_EPOCH_END = 1.05  # Mining and centroids take a share of an epoch that is not known after the first steps.

_log = logging.getLogger(__name__)


def total_steps(config: ConfigDict, steps_per_epoch: int, meta: Mapping[str, Any]) -> int:
  """Returns the number of steps of a run: that which was chosen for its time limit, or that of all its epochs.

  Args:
    config: the whole config.
    steps_per_epoch: batches in an epoch.
    meta: JSON part of a checkpoint of the run.
  """
  return int(meta.get(_STEPS, config.train.epochs * steps_per_epoch))


class TimeLimit:
  """Chooses the number of steps of a run, so that training takes about `train.minutes`.

  The choice is made once, after 22 steps, and is kept in the checkpoints. It is at most the steps of `train.epochs`,
  and the last epoch may be cut. Until then, the learning rate follows the schedule of all epochs.

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
  def total_steps(self) -> int:
    """Steps of the whole run; until the choice is made, those of all epochs."""
    return total_steps(self._config, self._steps_per_epoch, self._meta)

  @property
  def epochs(self) -> int:
    """Number of epochs, of which the last may be cut."""
    return -(-self.total_steps // self._steps_per_epoch)

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
    if not self._config.train.minutes or _STEPS in self._meta:
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
      self._meta[_STEPS] = self._choose(step, *map(float, times))

  def _choose(self, step: int, seconds: float, spent: float) -> int:
    """Returns the number of steps, given the number and the seconds of a step and those of training so far."""
    minutes, most = self._config.train.minutes, self.total_steps
    steps = min(step + max(int((60 * minutes - spent) / (_EPOCH_END * seconds)), 0), most)
    _log.info(
      "train.minutes=%g: a step takes %.3g s; steps of this run: %d of %d, which are %.3g of %d epochs",
      minutes,
      seconds,
      steps,
      most,
      steps / self._steps_per_epoch,
      self._config.train.epochs,
    )
    if 60 * minutes < spent:
      _log.warning("train.minutes=%g: the first %d steps took longer, and training ends with them", minutes, step)
    return steps
