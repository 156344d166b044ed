"""The first dimensions of vectors, scaled to unit norm again, as a model of `train.matryoshka_dims` is trained."""

import jax
import numpy as np

from vixml_jax.array_file import release_pages


def unit_prefix(vectors: np.ndarray | jax.Array, dims: int) -> np.ndarray:
  """Returns the first dimensions of vectors at unit norm, float32 [n, dims]; a zero vector stays zero.

  >>> unit_prefix(np.asarray([[3.0, 4.0, 12.0]]), 2).tolist()
  [[0.6000000238418579, 0.800000011920929]]

  Args:
    vectors: [n, D].
    dims: Number of dimensions, at most D.
  """
  prefix = np.asarray(vectors[:, :dims], np.float32)
  return prefix / np.sqrt(np.maximum(np.sum(np.square(prefix), axis=1, keepdims=True), 1e-24))


class UnitPrefixes:
  """Unit prefixes of the rows of an array, computed when they are read.

  Attributes:
    shape: [n, dims].
    dtype: float32.
  """

  dtype = np.dtype(np.float32)

  def __init__(self, vectors: np.ndarray, dims: int):
    """Wraps vectors [n, D], memory-mapped or not, of which `dims` dimensions are used."""
    self._vectors = vectors
    self.shape = (len(vectors), dims)

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
    """Returns some of the rows, float32 [rows, dims]."""
    dims = self.shape[1]
    return unit_prefix(self._vectors[:, :dims][rows], dims)

  @property
  def source(self) -> np.ndarray:
    """The whole vectors, [n, D]."""
    return self._vectors


def release_rows(vectors: np.ndarray | UnitPrefixes) -> None:
  """Frees the memory of the pages that have been read of memory-mapped vectors; see `array_file.release_pages`."""
  release_pages(vectors.source if isinstance(vectors, UnitPrefixes) else vectors)
