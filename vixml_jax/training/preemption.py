"""SIGTERM and Ctrl-C: a run that is asked to stop ends its step and saves itself, so that it can be continued."""

from collections.abc import Callable, Iterator
import contextlib
import logging
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax

from vixml_jax import stopping
from vixml_jax.errors import Preempted

_log = logging.getLogger(__name__)


class Preemption:
  """Notices SIGTERM and Ctrl-C (SIGINT) while the `with` block runs, and restores the former handlers afterwards.

  A second Ctrl-C stops the run at once; it then continues from its last checkpoint. Python allows only the main thread
  to receive signals: in another thread, nothing is noticed and nothing is changed. Several processes must stop at the
  same step: the handler of `jax.distributed` takes care of SIGTERM and stays.

  Args:
    reached: whether the processes agreed to stop at a step; used with several processes.
  """

  def __init__(self, reached: Callable[[int], bool]):
    self._reached = reached
    self._alone = jax.process_count() == 1
    self._received: int | None = None
    self._saved: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> Self:
    if self._alone and threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        # A shell ignores the Ctrl-C of its background jobs, and a handler outside of Python cannot be restored.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
          self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *exception: object) -> None:
    stopping.is_saving("steps", False)
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def asked(self, step: int) -> bool:
    """Returns whether the run must stop after this step."""
    return self._received is not None if self._alone else self._reached(step)

  def error(self, step: int) -> Preempted | KeyboardInterrupt:
    """Returns what a run raises after it has saved a step."""
    message = f"saved step {step}; start the same command again to continue"
    return KeyboardInterrupt(message) if self._received == signal.SIGINT else Preempted(message)

  @contextlib.contextmanager
  def at_once(self, step: int) -> Iterator[None]:
    """Raises `error` as soon as the run is asked to stop, since a step is saved and the block does not train.

    Args:
      step: the step that is saved.
    """
    if self._received is not None:
      raise self.error(step)
    self._saved = step
    try:
      yield
    finally:
      self._saved = None

  def _receive(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and self._received == signal.SIGINT:
      raise KeyboardInterrupt
    self._received = number
    if self._saved is not None:
      raise self.error(self._saved)
    if number == signal.SIGINT:
      _log.warning("the run is saved after this step, and then stops; Ctrl-C again stops it at once")
