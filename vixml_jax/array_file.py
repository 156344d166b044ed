"""Writes an array to a .npy file block by block, without holding it in memory."""

import os

import numpy as np


class ArrayFile:
  """A .npy file to which rows are appended; numpy maps it once the `with` block has ended.

  Attributes:
    rows: number of rows so far.
  """

  def __init__(self, path: str | os.PathLike, dtype: np.typing.DTypeLike, row_shape: tuple[int, ...] = ()):
    """Starts a file.

    Args:
      path: of the file, `.npy` included.
      dtype: of the array.
      row_shape: shape of a row; () for an array of one dimension.
    """
    self.rows = 0
    self._dtype = np.dtype(dtype)
    self._row_shape = row_shape
    self._file = open(path, "wb")  # noqa: SIM115, closed by __exit__
    self._write_header()

  def append(self, rows: np.ndarray) -> None:
    """Adds rows, [any number, *row_shape]."""
    if rows.shape[1:] != self._row_shape:
      raise ValueError(f"rows of shape {rows.shape[1:]} for an array of rows {self._row_shape}")
    self._file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
    self.rows += len(rows)

  def __enter__(self) -> "ArrayFile":
    return self

  def __exit__(self, *exception) -> None:
    with self._file:
      self._file.seek(0)
      self._write_header()

  def _write_header(self) -> None:
    # numpy pads a header so that its size does not depend on the length of the array.
    np.lib.format.write_array_header_1_0(
      self._file, {"descr": self._dtype.str, "fortran_order": False, "shape": (self.rows, *self._row_shape)}
    )
