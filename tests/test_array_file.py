"""Memory-mapped arrays: the pages that have been read do not count as memory of the process."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from vixml_jax.array_file import release_pages

_STATM = Path("/proc/self/statm")
_SHARED = 2  # Position in the file: resident pages of files.


def _resident_file_bytes():
  return int(_STATM.read_text(encoding="ascii").split()[_SHARED]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not _STATM.exists() or not hasattr(mmap, "MADV_DONTNEED"), reason="needs Linux")
def test_pages_of_a_memory_mapped_array_and_of_its_views_are_freed_and_can_be_read_again(tmp_path):
  size = 32 * 2**20
  np.save(tmp_path / "x.npy", np.arange(size // 4, dtype=np.float32).reshape(-1, 64))
  mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
  before = _resident_file_bytes()
  for array in (mapped, np.asarray(mapped[10:])):
    total = array.sum(dtype=np.float64)
    assert _resident_file_bytes() - before > 0.9 * size
    release_pages(array)
    assert _resident_file_bytes() - before < 0.1 * size
    assert array.sum(dtype=np.float64) == total
    release_pages(array)


def test_other_arrays_are_left_alone():
  array = np.arange(5)
  release_pages(array)
  release_pages(array[1:])
  assert array.tolist() == [0, 1, 2, 3, 4]
