"""Makes the next item of an iterator in a thread while the caller works with the last one."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetched(items: Iterator[Item], thread: str) -> Generator[Item]:
  """Yields the items; a thread makes the next one meanwhile. Close the generator to end the thread early.

  >>> list(prefetched(iter("abc"), "letters"))
  ['a', 'b', 'c']

  Args:
    items: Iterator without None.
    thread: Name of the thread.
  """
  with ThreadPoolExecutor(1, thread) as pool:
    future = pool.submit(next, items, None)
    while (item := future.result()) is not None:
      future = pool.submit(next, items, None)
      yield item
