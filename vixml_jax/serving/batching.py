"""Gathers requests of many threads into batches, which one thread answers."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
import dataclasses
import threading
from typing import Generic, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class QueueFull(Exception):
  """Raised if too many requests are waiting, or the batcher is closed."""


@dataclasses.dataclass(frozen=True)
class _Waiting(Generic[Request, Result]):
  """A request in the queue."""

  request: Request
  result: "Future[Result]"


class Batcher(Generic[Request, Result]):
  """A bounded queue of requests, and the thread that answers them.

  A request that finds the thread free is answered at once. Those that arrive meanwhile form the next batch, in their
  order. A request whose future is cancelled while it waits is dropped. If a batch fails, its requests are tried again
  one by one, so that only the faulty ones fail.
  """

  def __init__(
    self,
    answer: Callable[[Sequence[Request]], Sequence[Result | Exception]],
    size: Callable[[Request], int],
    *,
    max_batch: int,
    max_size: int,
    max_queue: int,
  ):
    """Starts the thread.

    Args:
      answer: Function that returns a result, or an exception, for each request of a batch.
      size: Function that returns the size of a request, such as its number of tokens.
      max_batch: Maximum number of requests in a batch.
      max_size: Maximum sum of the sizes of a batch of more than one request.
      max_queue: Maximum number of waiting requests.
    """
    self._answer, self._size = answer, size
    self._max_batch, self._max_size, self._max_queue = max_batch, max_size, max_queue
    self._queue: deque[_Waiting[Request, Result]] = deque()
    self._changed = threading.Condition()
    self._closing = False
    self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
    self._thread.start()

  def __len__(self) -> int:
    return len(self._queue)

  @property
  def alive(self) -> bool:
    """Whether the thread runs that answers requests."""
    return self._thread.is_alive()

  def submit(self, requests: Sequence[Request]) -> "list[Future[Result]]":
    """Queues all of the requests, or none of them.

    Raises:
      QueueFull: There is no room for all of them.
    """
    added: list[_Waiting[Request, Result]] = [_Waiting(request, Future()) for request in requests]
    with self._changed:
      if len(self._queue) + len(added) > self._max_queue:
        self._drop_cancelled()
      if self._closing or len(self._queue) + len(added) > self._max_queue:
        raise QueueFull
      self._queue.extend(added)
      self._changed.notify()
    return [waiting.result for waiting in added]

  def close(self) -> None:
    """Refuses new requests, and returns when all that wait are answered."""
    with self._changed:
      self._closing = True
      self._changed.notify()
    self._thread.join()

  def _work(self) -> None:
    while batch := self._next():
      self._run([waiting for waiting in batch if waiting.result.set_running_or_notify_cancel()])

  def _next(self) -> list[_Waiting[Request, Result]]:
    """Returns the next batch; an empty one if the queue is closed and empty."""
    batch: list[_Waiting[Request, Result]] = []
    with self._changed:
      while not self._queue or self._drop_cancelled():
        if self._closing:
          return []
        self._changed.wait_for(lambda: self._queue or self._closing)
      left = self._max_size
      while self._queue and len(batch) < self._max_batch:
        left -= self._size(self._queue[0].request)
        if batch and left < 0:
          break
        batch.append(self._queue.popleft())
    return batch

  def _drop_cancelled(self) -> bool:
    """Drops the requests that were cancelled; returns whether none is left."""
    self._queue = deque(waiting for waiting in self._queue if not waiting.result.cancelled())
    return not self._queue

  def _run(self, batch: list[_Waiting[Request, Result]]) -> None:
    if not batch:
      return
    try:
      results = self._answer([waiting.request for waiting in batch])
    except Exception as error:
      if len(batch) == 1:
        batch[0].result.set_exception(error)
        return
      for waiting in batch:
        self._run([waiting])
      return
    for waiting, result in zip(batch, results, strict=True):
      if isinstance(result, Exception):
        waiting.result.set_exception(result)
      else:
        waiting.result.set_result(result)
