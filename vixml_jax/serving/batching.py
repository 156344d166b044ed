"""Gathers what many threads ask into batches, which one thread answers."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
import dataclasses
import threading
import time
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class QueueFull(Exception):
  """More is waiting than may, or the batcher is closed."""


@dataclasses.dataclass(frozen=True)
class _Job(Generic[Request, Result]):
  asked: Request
  answer: "Future[Result]"
  arrived: float


class Batcher(Generic[Request, Result]):
  """A bounded queue, and the one thread that works it off.

  Whatever waits when the thread is free is answered together. What fails as a batch is tried again one by one, so that
  only those at fault fail.

  Args:
    answer: gives a result, or an exception, for each that is asked.
    max_batch: the most that are answered together.
    max_wait: seconds that the first of a batch waits for others.
    max_queue: the most that wait.
  """

  def __init__(
    self,
    answer: Callable[[Sequence[Request]], Sequence[Result | Exception]],
    *,
    max_batch: int,
    max_wait: float,
    max_queue: int,
  ):
    self._answer = answer
    self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
    self._waiting: deque[_Job[Request, Result]] = deque()
    self._changed = threading.Condition()
    self._closing = False
    self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
    self._thread.start()

  def __len__(self) -> int:
    return len(self._waiting)

  def submit(self, asked: Sequence[Request]) -> "list[Future[Result]]":
    """Queues all that are asked, or none of them.

    Raises:
      QueueFull: there is no room for all.
    """
    arrived = time.monotonic()
    jobs: list[_Job[Request, Result]] = [_Job(each, Future(), arrived) for each in asked]
    with self._changed:
      if self._closing or len(self._waiting) + len(jobs) > self._max_queue:
        raise QueueFull
      self._waiting.extend(jobs)
      self._changed.notify()
    return [job.answer for job in jobs]

  def close(self) -> None:
    """Takes no more, and returns when all that waited is answered."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join()

  def _work(self) -> None:
    while batch := self._next():
      self._do([job for job in batch if job.answer.set_running_or_notify_cancel()])

  def _next(self) -> list[_Job[Request, Result]]:
    """The next batch; empty when the queue is closed and worked off."""
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or self._closing)
      if self._waiting:
        left = self._waiting[0].arrived + self._max_wait - time.monotonic()
        self._changed.wait_for(lambda: len(self._waiting) >= self._max_batch or self._closing, max(left, 0))
      return [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]

  def _do(self, batch: list[_Job[Request, Result]]) -> None:
    if not batch:
      return
    try:
      answers = self._answer([job.asked for job in batch])
    except Exception as error:
      if len(batch) == 1:
        batch[0].answer.set_exception(error)
        return
      for job in batch:
        self._do([job])
      return
    for job, answer in zip(batch, answers, strict=True):
      if isinstance(answer, Exception):
        job.answer.set_exception(answer)
      else:
        job.answer.set_result(answer)
