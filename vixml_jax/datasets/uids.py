"""Finds rows by the uid of an item, with eight bytes for each uid."""

import hashlib

import numpy as np


def hash_of_uid(uid: str) -> int:
  """Returns a hash of a uid that fits int64. Among five million uids, two share a hash with probability 1e-6.

  >>> hash_of_uid("B0001") == hash_of_uid("B0001"), hash_of_uid("B0001") == hash_of_uid("B0002")
  (True, False)
  """
  return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little", signed=True)


class UidTable:
  """Rows by hash of uid."""

  def __init__(self, hashes: np.ndarray):
    """Sorts the hashes of the uids of all rows, int64 [R]."""
    self._rows = np.argsort(hashes, kind="stable").astype(np.int32)
    self._sorted = hashes[self._rows]

  def find(self, hashes: np.ndarray) -> np.ndarray:
    """Returns for each hash the first row with it, or -1, int32 [number of hashes].

    >>> UidTable(np.array([30, 10, 30])).find(np.array([30, 20]))
    array([ 0, -1], dtype=int32)
    """
    starts = np.searchsorted(self._sorted, hashes)
    found = starts < len(self._sorted)
    found[found] = self._sorted[starts[found]] == hashes[found]
    rows = np.full(len(hashes), -1, np.int32)
    rows[found] = self._rows[starts[found]]
    return rows
