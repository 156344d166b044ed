"""Writes an array to a `.npy` file block by block, and reads a memory-mapped one, without holding it in memory."""

import mmap
import os
from pathlib import Path
from typing import Self

import numpy as np


class ArrayFile:
  """A `.npy` file to which rows are appended. numpy can read it after the `with` block.

  Attributes:
    rows: Number of rows that have been appended.
  """

  def __init__(self, path: str | os.PathLike[str], dtype: np.typing.DTypeLike, row_shape: tuple[int, ...] = ()):
    """Creates the file.

    Args:
      path: Path of the file, with its suffix `.npy`.
      dtype: Type of the array.
      row_shape: Shape of a row; () for a one-dimensional array.
    """
    self.rows = 0
    self._dtype = np.dtype(dtype)
    self._row_shape = row_shape
    self._file = Path(path).open("wb")  # noqa: SIM115, closed by __exit__
    self._write_header()

  def append(self, rows: np.ndarray) -> None:
    """Appends rows of shape [n, *row_shape].

    Raises:
      ValueError: The rows have another shape.
    """
    if rows.shape[1:] != self._row_shape:
      raise ValueError(f"rows must have shape {self._row_shape}, but have {rows.shape[1:]}")
    self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
    self.rows += len(rows)

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exception: object) -> None:
    with self._file:
      self._file.seek(0)
      self._write_header()

  def _write_header(self) -> None:
    # numpy pads the header so that its size does not depend on the length of the array.
    np.lib.format.write_array_header_1_0(
      self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
    )


def release_pages(array: np.ndarray) -> None:
  """Frees the memory of the pages that have been read of a memory-mapped array; does nothing for any other array.

  The pages stay in the cache of the operating system, but no longer count as memory of the process. The array can be
  read again.
  """
  base: object = array
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
    base.madvise(mmap.MADV_DONTNEED)
