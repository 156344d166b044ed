"""Fails when a device, or the host of a process, holds more of the embeddings of all labels or queries than a share.

`python -m tests.helpers.share_guard DIM MOST_ROWS FLAGS...` runs `vixml_jax.main` with these flags under the guard.
"""

import sys

import jax
from jax._src.array import ArrayImpl
import numpy as np

from vixml_jax import sharded_rows, sharding
from vixml_jax.evaluation import baselines, classifier_search, evaluator
from vixml_jax.report import label_map

BLOCK = 64
"""Rows of a block while the guard is on; the real blocks are larger than miniature data sets."""


class Violation(AssertionError):
  """More than a share was held."""


class ShareGuard:
  """Watches every copy between host and devices, and the arrays on the devices meanwhile.

  Attributes:
    copies: number of copies of embeddings that were checked.
    arrays: number of arrays of all rows on the devices that were checked.
  """

  def __init__(self, dim: int, most_rows: int):
    """Makes a guard.

    Args:
      dim: D; arrays of floating-point numbers [rows, D] are embeddings.
      most_rows: the most rows that may be on a host at once, and on a device of a larger array.
    """
    self.copies = self.arrays = 0
    self._dim, self._most_rows = dim, most_rows

  def _is_embeddings(self, array) -> bool:
    return array.ndim == 2 and array.shape[1] == self._dim and np.issubdtype(np.dtype(array.dtype), np.floating)

  def check_copy(self, array) -> None:
    """Checks an array that is copied from or to the host."""
    if not self._is_embeddings(array):
      return
    self.copies += 1
    if len(array) > self._most_rows:
      raise Violation(f"an array {array.shape} is copied whole between host and devices")
    self.check_devices()

  def check_devices(self) -> None:
    """Checks the shares of all arrays on the devices."""
    for array in jax.live_arrays():
      if array.is_deleted() or not self._is_embeddings(array) or len(array) <= self._most_rows:
        continue
      self.arrays += 1
      rows = max(shard.data.shape[0] for shard in array.addressable_shards)
      if rows > self._most_rows:
        raise Violation(f"a device holds {rows} of the rows of an array {array.shape}")

  def install(self, patch) -> None:
    """Puts the guard around all copies, and makes blocks small.

    Args:
      patch: sets an attribute of an object, like `monkeypatch.setattr`.
    """
    to_host, to_global = ArrayImpl.__array__, sharding.to_global

    def checked_to_host(array, *args, **kwargs):
      self.check_copy(array)
      return to_host(array, *args, **kwargs)

    def checked_to_global(host, where):
      self.check_copy(np.asarray(host))
      return to_global(host, where)

    patch(ArrayImpl, "__array__", checked_to_host)
    patch(sharding, "to_global", checked_to_global)
    patch(sharded_rows, "BLOCK_ROWS", BLOCK)
    patch(evaluator, "QUERIES_PER_BLOCK", BLOCK)
    patch(baselines, "QUERIES_PER_BLOCK", BLOCK)
    patch(classifier_search, "QUERIES_PER_BLOCK", BLOCK)
    patch(label_map, "MOST_LABELS", BLOCK)
    patch(evaluator, "_SCANN_BYTES", 0)  # ScaNN needs all vectors on the host, and is compared at small sizes only.


if __name__ == "__main__":
  ShareGuard(int(sys.argv[1]), int(sys.argv[2])).install(setattr)
  del sys.argv[1:3]
  import runpy

  runpy.run_module("vixml_jax.main", run_name="__main__", alter_sys=True)
