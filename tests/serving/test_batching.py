"""The batcher gathers requests, and tries the requests of a failed batch one by one."""

import threading
import time

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

  batcher = Batcher(answer, max_batch=4, max_wait=0, max_queue=6)
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


def test_a_batch_waits_for_others_but_not_for_long():
  batches = []
  batcher = Batcher(lambda asked: batches.append(asked) or asked, max_batch=3, max_wait=0.3, max_queue=9)
  started = time.monotonic()
  futures = batcher.submit([1])
  time.sleep(0.05)
  futures += batcher.submit([2])
  assert [future.result() for future in futures] == [1, 2] and 0.25 < time.monotonic() - started < 5
  started = time.monotonic()
  assert [future.result() for future in batcher.submit([3, 4, 5])] == [3, 4, 5]
  assert time.monotonic() - started < 0.25
  batcher.close()
  assert [len(batch) for batch in batches] == [2, 3]
