"""The first dimensions of vectors, with the norm of whole vectors, as a model of `train.matryoshka_dims` is trained."""

import jax
import numpy as np

from vixml_jax.array_file import release_pages


def scaled_prefix(vectors: np.ndarray | jax.Array, dims: int) -> np.ndarray:
  """Returns the first dimensions of vectors, scaled to the norm of the vectors; float32 [n, dims].

  So prefixes of embeddings of unit norm have unit norm. A prefix of zeros stays zero.

  >>> scaled_prefix(np.asarray([[1.0, 2.0, 2.0]]), 1).tolist()
  [[3.0]]

  Args:
    vectors: [n, D].
    dims: Number of dimensions, at most D.
  """
  whole = np.asarray(vectors, np.float32)
  prefix = whole[:, :dims]
  return prefix * (_norms(whole) / np.maximum(_norms(prefix), 1e-12))


def _norms(vectors: np.ndarray) -> np.ndarray:
  return np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]


class ScaledPrefixes:
  """Scaled prefixes of the rows of an array, computed when they are read.

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
    return scaled_prefix(self._vectors[rows], self.shape[1])

  @property
  def source(self) -> np.ndarray:
    """The whole vectors, [n, D]."""
    return self._vectors


def release_rows(vectors: np.ndarray | ScaledPrefixes) -> None:
  """Frees the memory of the pages that have been read of memory-mapped vectors; see `array_file.release_pages`."""
  release_pages(vectors.source if isinstance(vectors, ScaledPrefixes) else vectors)
