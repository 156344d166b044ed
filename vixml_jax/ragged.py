"""Rows of different lengths as two flat arrays, so that millions of rows cost no Python objects."""

import dataclasses
import os

import numpy as np

from vixml_jax.errors import InputError


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
    return self.values[self.offsets[row]:self.offsets[row + 1]]

  @property
  def lengths(self) -> np.ndarray:
    """int64 array with the length of every row."""
    return np.diff(self.offsets)

  def take(self, rows: np.ndarray) -> "Ragged":
    """The given rows, in the given order, copied into memory."""
    rows = np.asarray(rows, np.int64)
    starts = self.offsets[rows]
    lengths = self.offsets[rows + 1] - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Ragged(np.asarray(self.values[positions]), offsets)

  def row_ids(self) -> np.ndarray:
    """int64 array, for every value the row that it belongs to."""
    return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

  def transpose(self, num_columns: int) -> "Ragged":
    """For every value `0 <= v < num_columns` the ascending rows that hold it (CSR -> CSC)."""
    order = np.argsort(self.values, kind="stable")
    counts = np.bincount(self.values, minlength=num_columns)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Ragged(self.row_ids()[order].astype(np.int32), offsets)

  @classmethod
  def from_rows(cls, rows, dtype=np.int32) -> "Ragged":
    """From a list of sequences; for small inputs."""
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = np.concatenate([np.asarray(row, dtype) for row in rows]) if len(rows) else np.zeros(0, dtype)
    return cls(flat.astype(dtype), offsets)

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
