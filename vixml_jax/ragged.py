"""Rows of different lengths as two flat arrays, so that millions of rows cost no Python objects."""

from collections.abc import Sequence
import dataclasses
import os

import numpy as np

from vixml_jax.errors import InputError


def offsets_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
  """int64 [rows + 1], where rows of these lengths begin and end when they stand end to end."""
  return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ranges(starts: np.ndarray | int, lengths: np.ndarray) -> np.ndarray:
  """start, start + 1, ... for each row, end to end: the places of `lengths[i]` values from `starts[i]` on."""
  offsets = offsets_of(lengths)
  return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


@dataclasses.dataclass(frozen=True)
class Ragged:
  """Row `i` is `values[offsets[i]:offsets[i + 1]]` (the CSR layout without data).

  Attributes:
    values: one-dimensional integer array, all rows end to end; may be memory-mapped.
    offsets: int64 array of `rows + 1` non-decreasing offsets into `values`.
  """

  values: np.ndarray
  offsets: np.ndarray

  def __post_init__(self):
    if self.offsets.ndim != 1 or len(self.offsets) == 0 or self.offsets[0] != 0:
      raise ValueError("offsets must be one-dimensional and start at 0")
    if self.offsets[-1] != len(self.values):
      raise ValueError(f"offsets end at {self.offsets[-1]} but there are {len(self.values)} values")

  def __len__(self) -> int:
    return len(self.offsets) - 1

  def __getitem__(self, row: int) -> np.ndarray:
    return self.values[self.offsets[row] : self.offsets[row + 1]]

  @classmethod
  def of_lengths(cls, values: np.ndarray, lengths: np.ndarray | Sequence[int]) -> "Ragged":
    """Rows of these lengths, cut from `values` one after the other."""
    return cls(values, offsets_of(lengths))

  @property
  def lengths(self) -> np.ndarray:
    """int64 array with the length of every row."""
    return np.diff(self.offsets)

  def take(self, rows: np.ndarray) -> "Ragged":
    """The given rows, in the given order, copied into memory."""
    rows = np.asarray(rows, np.int64)
    starts = self.offsets[rows]
    lengths = self.offsets[rows + 1] - starts
    return Ragged.of_lengths(np.asarray(self.values[ranges(starts, lengths)]), lengths)

  def first(self, count: int) -> "Ragged":
    """The first `count` values of every row."""
    lengths = np.minimum(self.lengths, count)
    if len(self.values) == lengths.sum():
      return self
    return Ragged.of_lengths(np.asarray(self.values[ranges(self.offsets[:-1], lengths)]), lengths)

  def followed_by(self, other: "Ragged") -> "Ragged":
    """These rows and then the others."""
    return Ragged(
      np.concatenate([self.values, other.values]), np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
    )

  def row_ids(self) -> np.ndarray:
    """int64 array, for every value the row that it belongs to."""
    return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

  def transpose(self, num_columns: int) -> "Ragged":
    """For every value `0 <= v < num_columns` the ascending rows that hold it (CSR -> CSC)."""
    order = np.argsort(self.values, kind="stable")
    counts = np.bincount(self.values, minlength=num_columns)
    return Ragged.of_lengths(self.row_ids()[order].astype(np.int32), counts)

  @classmethod
  def from_rows(cls, rows, dtype=np.int32) -> "Ragged":
    """From a list of sequences; for small inputs."""
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if len(rows) else np.zeros(0, dtype)
    return cls.of_lengths(flat.astype(dtype), [len(row) for row in rows])

  def save(self, path: str | os.PathLike) -> None:
    """Writes `PATH.values.npy` and `PATH.offsets.npy`."""
    np.save(f"{path}.values.npy", self.values)
    np.save(f"{path}.offsets.npy", self.offsets)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Ragged":
    """Memory-maps what `save` wrote."""
    try:
      return cls(np.load(f"{path}.values.npy", mmap_mode="r"), np.load(f"{path}.offsets.npy"))
    except (OSError, ValueError) as error:
      raise InputError(f"{path}.values.npy: cannot be read ({error}); delete its folder to build it again") from error
