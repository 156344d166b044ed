"""SIGTERM: a run that the scheduler stops ends its step, saves itself and exits with status 0."""

from collections.abc import Callable
import signal
from types import FrameType
from typing import Self

import jax


class Preemption:
  """Notices SIGTERM while the `with` block runs.

  Several processes must stop at the same step: the handler of `jax.distributed` takes care of that and stays.

  Args:
    reached: whether the processes agreed to stop at a step; used with several processes.
  """

  def __init__(self, reached: Callable[[int], bool]):
    self._reached = reached
    self._alone = jax.process_count() == 1
    self._received = False

  def __enter__(self) -> Self:
    if self._alone:
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def __exit__(self, *exception: object) -> None:
    if self._alone:
      signal.signal(signal.SIGTERM, self._previous)

  def asked(self, step: int) -> bool:
    """Returns whether the run must stop after this step."""
    return self._received if self._alone else self._reached(step)

  def _receive(self, number: int, frame: FrameType | None) -> None:
    self._received = True
