"""The batcher gathers requests, and tries the requests of a failed batch one by one."""

import threading

import pytest

from tests.helpers.http_server import wait_for
from vixml_jax.serving.batching import Batcher, QueueFull


def test_waiting_requests_share_a_batch_and_a_failed_batch_is_split():
  batches, go = [], threading.Event()

  def answer(asked):
    batches.append(list(asked))
    go.wait()
    if len(asked) > 1 and 7 in asked:
      raise RuntimeError("a batch with 7")
    if asked == [7]:
      raise ValueError("7 alone")
    return [KeyError(number) if number == 3 else 10 * number for number in asked]

  batcher = Batcher(answer, lambda number: 1, max_batch=4, max_size=100, max_queue=6)
  first = batcher.submit([0])
  wait_for(lambda: batches)
  rest = batcher.submit([1, 2, 3, 5]) + batcher.submit([6, 7])
  with pytest.raises(QueueFull):
    batcher.submit([8])
  assert len(batcher) == 6
  go.set()
  batcher.close()
  assert [future.exception() or future.result() for future in (*first, *rest[:2], *rest[3:5])] == [0, 10, 20, 50, 60]
  assert isinstance(rest[2].exception(), KeyError) and isinstance(rest[5].exception(), ValueError)
  assert batches == [[0], [1, 2, 3, 5], [6, 7], [6], [7]]
  with pytest.raises(QueueFull):
    batcher.submit([9])


def test_a_lone_request_is_answered_at_once_and_those_that_come_meanwhile_form_batches_by_size():
  batches, go = [], threading.Semaphore(0)

  def answer(asked):
    batches.append(list(asked))
    go.acquire()
    return asked

  batcher = Batcher(answer, lambda number: number, max_batch=3, max_size=10, max_queue=9)
  futures = batcher.submit([4])
  wait_for(lambda: batches == [[4]])  # No other request has arrived, and none will until it is answered.
  futures += batcher.submit([5, 5, 1, 30, 2, 2, 2, 2])
  for _ in range(9):
    go.release()
  assert [future.result() for future in futures] == [4, 5, 5, 1, 30, 2, 2, 2, 2]
  batcher.close()
  # Sizes of 10 are reached exactly, 30 is alone although it is too large, and four requests are too many.
  assert batches == [[4], [5, 5], [1], [30], [2, 2, 2], [2]]
