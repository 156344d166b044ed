"""Assigns items to rows of fixed length by best-fit decreasing, all items of one length at a time."""

from typing import NamedTuple

import numpy as np

from vixml_jax.ragged import ranges


class Assignment(NamedTuple):
  """The places of items in rows.

  Attributes:
    rows: Row of each item, int64 [items].
    slots: Slot of each item in its row, from 0, int64 [items].
    starts: Number of tokens of the items in earlier slots of the row, int64 [items].
  """

  rows: np.ndarray
  slots: np.ndarray
  starts: np.ndarray


def assign_rows(lengths: np.ndarray, row_length: int, max_slots: int) -> Assignment:
  """Assigns items to rows by best-fit decreasing: longest items first, ties by index.

  An item goes to the fullest row that has room for it; of equally full rows, to the one that was filled last.

  >>> assignment = assign_rows(np.array([3, 6, 2, 5]), row_length=8, max_slots=4)
  >>> assignment.rows, assignment.slots, assignment.starts
  (array([1, 0, 0, 1]), array([1, 0, 1, 0]), array([5, 0, 6, 0]))

  Args:
    lengths: Number of tokens of each item, 0 to `row_length`, int [items].
    row_length: T.
    max_slots: S.
  """
  # Keys of 8 or 16 bits are sorted in linear time.
  order = np.argsort((row_length - lengths).astype(np.min_scalar_type(row_length)), kind="stable")
  counts = np.bincount(lengths, minlength=1)
  rows = _Rows(row_length, max_slots, len(lengths))
  for size in np.flatnonzero(counts)[::-1].tolist():
    rows.place(size, int(counts[size]))
  sorted_places = (np.concatenate([np.zeros(0, np.int64), *parts]) for parts in (rows.rows, rows.slots, rows.starts))
  places = Assignment(*(np.empty(len(lengths), np.int64) for _ in Assignment._fields))
  for place, sorted_place in zip(places, sorted_places, strict=True):
    place[order] = sorted_place
  return places


class _Rows:
  """Rows that are being filled.

  Attributes:
    rows: Rows of the items so far, in the order in which they were placed, in parts.
    slots: Their slots.
    starts: Their starts.
  """

  def __init__(self, row_length: int, max_slots: int, most: int):
    """Starts without rows; there will be at most `most`."""
    self.rows: list[np.ndarray] = []
    self.slots: list[np.ndarray] = []
    self.starts: list[np.ndarray] = []
    self._row_length, self._max_slots = row_length, max_slots
    # The rows with a free slot by number of free tokens; those that were filled last come last.
    self._open: list[list[int]] = [[] for _ in range(row_length + 1)]
    self._used_slots = np.zeros(most, np.int64)
    self._num_rows = 0

  def place(self, size: int, count: int) -> None:
    """Places `count` items of `size` tokens; later ones must not be longer.

    Item by item, a row that has got one of the items is the fullest with room for the next one, so it gets items until
    it is full. What is left of it is then smaller than `size`. So each number of free tokens is looked at once.
    """
    for free in range(size, self._row_length + 1):
      if count and self._open[free]:
        count -= self._fill(free, size, count)
    if count:
      new = range(self._num_rows, self._num_rows - (-count // self._capacity(self._row_length, size)))
      self._num_rows = new.stop
      self._open[self._row_length] = list(reversed(new))
      self._fill(self._row_length, size, count)

  def _capacity(self, free: int, size: int) -> int:
    """Returns the number of items of `size` tokens in a row with `free` free tokens and S free slots."""
    return min(free // size, self._max_slots) if size else self._max_slots

  def _fill(self, free: int, size: int, count: int) -> int:
    """Fills rows with `free` free tokens, the last ones first; returns the number of items that were placed."""
    rows = np.array(self._open[free][: -count - 1 : -1])
    capacity = self._capacity(free, size)
    used = self._used_slots[rows]
    numbers = np.minimum(capacity, self._max_slots - used)
    ends = np.cumsum(numbers)
    touched = min(int(np.searchsorted(ends, count)) + 1, len(rows))
    rows, used, numbers = rows[:touched], used[:touched], numbers[:touched]
    placed = min(count, int(ends[touched - 1]))
    numbers[-1] -= ends[touched - 1] - placed
    ordinals = ranges(0, numbers)
    self.rows.append(np.repeat(rows, numbers))
    self.slots.append(np.repeat(used, numbers) + ordinals)
    self.starts.append(self._row_length - free + size * ordinals)
    used += numbers
    self._used_slots[rows] = used
    del self._open[free][-touched:]
    still_open = used < self._max_slots
    # Only the last row may have room for another item of this size.
    for part, left in (
      (rows[:-1][still_open[:-1]], free - capacity * size),
      (rows[-1:][still_open[-1:]], free - int(numbers[-1]) * size),
    ):
      if left:
        self._open[left].extend(part.tolist())
    return placed
