"""Rows of different lengths as two flat arrays, so that millions of rows need no Python objects."""

from collections.abc import Sequence
import dataclasses
import os
from typing import Any

import numpy as np

from vixml_jax.errors import InputError


def offsets_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
  """Returns the offsets of rows that are stored one after the other, int64 [rows + 1].

  >>> offsets_of([2, 0, 3])
  array([0, 2, 2, 5])

  Args:
    lengths: Length of each row.
  """
  offsets = np.zeros(len(lengths) + 1, np.int64)
  np.cumsum(lengths, out=offsets[1:])
  return offsets


def ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
  """Concatenates the ranges `start, start + 1, ..., start + length - 1` of all rows.

  >>> ranges(np.array([10, 20, 30]), np.array([2, 0, 3]))
  array([10, 11, 30, 31, 32])

  Args:
    starts: First value of each range, or one first value for all.
    lengths: Length of each range.

  Returns:
    int64 [sum of the lengths].
  """
  offsets = offsets_of(lengths)
  return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


@dataclasses.dataclass(frozen=True, repr=False)
class Ragged:
  """Rows of integers with different lengths: row `i` is `values[offsets[i] : offsets[i + 1]]`.

  This is the CSR layout without data. Label ids of queries and token ids of texts are stored so.

  >>> rows = Ragged.from_rows([[3, 1], [], [4, 1, 5]])
  >>> len(rows), rows[2], rows.lengths
  (3, array([4, 1, 5], dtype=int32), array([2, 0, 3]))
  >>> rows.values
  array([3, 1, 4, 1, 5], dtype=int32)
  >>> rows.offsets
  array([0, 2, 2, 5])

  Attributes:
    values: The values of all rows, a one-dimensional integer array, which may be memory-mapped.
    offsets: Ascending offsets of the rows in `values`, int64 [rows + 1].
  """

  values: np.ndarray
  offsets: np.ndarray

  def __repr__(self) -> str:
    return f"Ragged(rows={len(self)}, values={len(self.values)})"

  def __post_init__(self) -> None:
    if self.offsets.ndim != 1 or len(self.offsets) == 0 or self.offsets[0] != 0:
      raise ValueError("offsets must be one-dimensional and start at 0")
    if self.offsets[-1] != len(self.values):
      raise ValueError(f"offsets end at {self.offsets[-1]}, but there are {len(self.values)} values")

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.values[self.offsets[row] : self.offsets[row + 1]]

  @classmethod
  def of_lengths(cls, values: np.ndarray, lengths: np.ndarray | Sequence[int]) -> "Ragged":
    """Makes rows of the given lengths from consecutive values.

    >>> [row.tolist() for row in Ragged.of_lengths(np.arange(5), [2, 0, 3])]
    [[0, 1], [], [2, 3, 4]]
    """
    return cls(values, offsets_of(lengths))

  @classmethod
  def from_rows(cls, rows: Sequence[Any], dtype: type = np.int32) -> "Ragged":
    """Makes rows from a list of sequences. It is meant for small inputs."""
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if len(rows) else np.zeros(0, dtype)
    return cls.of_lengths(flat.astype(dtype), [len(row) for row in rows])

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> "Ragged":
    """Opens the files of `save`. Values are memory-mapped.

    Raises:
      InputError: A file cannot be read.
    """
    try:
      return cls(np.load(f"{path}.values.npy", mmap_mode="r"), np.load(f"{path}.offsets.npy"))
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f"{path}.values.npy: cannot be read ({error}); delete its folder to build it again") from error

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes `PATH.values.npy` and `PATH.offsets.npy`."""
    np.save(f"{path}.values.npy", self.values)
    np.save(f"{path}.offsets.npy", self.offsets)

  @property
  def lengths(self) -> np.ndarray:
    """Length of every row, int64 [rows]."""
    return np.diff(self.offsets)

  def row_ids(self) -> np.ndarray:
    """Returns the row of every value, int64 [values].

    >>> Ragged.from_rows([[3, 1], [], [4, 1, 5]]).row_ids()
    array([0, 0, 2, 2, 2])
    """
    return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

  def keep(self, rows: np.ndarray) -> "Ragged":
    """Returns the same number of rows, of which those that are not chosen by bool [rows] are empty.

    >>> Ragged.from_rows([[1, 2], [3], [4]]).keep(np.array([True, False, True])).lengths.tolist()
    [2, 0, 1]
    """
    if rows.all():
      return self
    return Ragged(self.values[np.repeat(rows, self.lengths)], offsets_of(np.where(rows, self.lengths, 0)))

  def take(self, rows: np.ndarray) -> "Ragged":
    """Returns the given rows in the given order, copied into memory.

    >>> [row.tolist() for row in Ragged.from_rows([[3, 1], [], [4, 1, 5]]).take(np.array([2, 0, 2]))]
    [[4, 1, 5], [3, 1], [4, 1, 5]]
    """
    rows = np.asarray(rows, np.int64)
    starts = self.offsets[rows]
    lengths = self.offsets[rows + 1] - starts
    return Ragged.of_lengths(np.asarray(self.values[ranges(starts, lengths)]), lengths)

  def first(self, count: int) -> "Ragged":
    """Returns at most the first `count` values of every row.

    >>> [row.tolist() for row in Ragged.from_rows([[3, 1], [], [4, 1, 5]]).first(1)]
    [[3], [], [4]]
    """
    lengths = np.minimum(self.lengths, count)
    if len(self.values) == lengths.sum():
      return self
    return Ragged.of_lengths(np.asarray(self.values[ranges(self.offsets[:-1], lengths)]), lengths)

  def followed_by(self, other: "Ragged") -> "Ragged":
    """Returns these rows followed by the other ones.

    >>> [row.tolist() for row in Ragged.from_rows([[3, 1]]).followed_by(Ragged.from_rows([[], [4]]))]
    [[3, 1], [], [4]]
    """
    return Ragged(
      np.concatenate([self.values, other.values]), np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
    )

  def transpose(self, num_columns: int) -> "Ragged":
    """Returns for every value in 0..num_columns-1 the ascending rows that contain it (CSR to CSC).

    >>> [row.tolist() for row in Ragged.from_rows([[3, 1], [], [1]]).transpose(4)]
    [[], [0, 2], [], [0]]
    """
    order = np.argsort(self.values, kind="stable")
    counts = np.bincount(self.values, minlength=num_columns)
    return Ragged.of_lengths(self.row_ids()[order].astype(np.int32), counts)


def padded(rows: Ragged, values: np.ndarray, missing: float) -> np.ndarray:
  """Returns one value for each place of ragged rows as an array [Q, longest row], filled with `missing`.

  >>> padded(Ragged.from_rows([[7, 8], [9]]), np.array([0.5, 0.25, 1.0]), -1)
  array([[ 0.5 ,  0.25],
         [ 1.  , -1.  ]])
  """
  places = np.arange(int(rows.lengths.max(initial=0))) < rows.lengths[:, None]
  array = np.full(places.shape, missing, values.dtype)
  array[places] = values
  return array


def padded_ids(rows: Ragged, num_rows: int, width: int) -> np.ndarray:
  """Returns ragged rows of ids as an array int32 [num_rows, width], filled with -1.

  >>> padded_ids(Ragged.from_rows([[7, 8], [9]]), 3, 2)
  array([[ 7,  8],
         [ 9, -1],
         [-1, -1]], dtype=int32)

  Args:
    rows: At most `num_rows` rows of at most `width` ids.
    num_rows: Number of rows of the result.
    width: Their length.
  """
  found = padded(rows, rows.values.astype(np.int32), -1)
  return np.pad(found, ((0, num_rows - len(found)), (0, width - found.shape[1])), constant_values=-1)
