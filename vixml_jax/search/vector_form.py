"""The form in which an index holds vectors for search: float32, int8 or bits, of all or the first dimensions."""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.search.compact_index import CompactIndex
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.index import Index
from vixml_jax.search.prefixes import ScaledPrefixes, scaled_prefix
from vixml_jax.search.vector_codes import DTYPES, bytes_per_label


class VectorForm(NamedTuple):
  """How vectors are held for search.

  Attributes:
    dtype: "float32", or "int8" or "bit" for codes, whose best labels are scored again in float32.
    dims: Number of dimensions that are searched; None for all.
  """

  dtype: str = "float32"
  dims: int | None = None

  @property
  def is_whole(self) -> bool:
    """Whether vectors are held as they are."""
    return self == VectorForm()

  def check(self, dim: int, search: str) -> None:
    """Checks that an index can have this form.

    Args:
      dim: Dimension of its vectors.
      search: "exact" or "scann".

    Raises:
      InputError: It cannot.
    """
    if self.dtype not in DTYPES:
      raise InputError(f"index_dtype={self.dtype!r} is not known: use one of {', '.join(DTYPES)}")
    if self.dims is not None and not 1 <= self.dims <= dim:
      raise InputError(f"dims={self.dims}: must be 1 to {dim}, the dimension of the vectors")
    if search != "exact" and not self.is_whole:
      given = f"index_dtype={self.dtype}" if self.dtype != "float32" else f"dims={self.dims}"
      raise InputError(f"{given}: needs search=exact, but search={search}; leave one of them out")

  def bytes_per_label(self, dim: int) -> int:
    """Returns the bytes of a vector in the memory that is searched, of vectors of dimension `dim`."""
    return bytes_per_label(self.dtype, self.dims or dim)

  def vectors(self, embeddings: np.ndarray) -> np.ndarray | ScaledPrefixes:
    """Returns the vectors of labels or training queries [n, D] that scores are computed with."""
    return embeddings if self.dims is None else ScaledPrefixes(embeddings, self.dims)

  def queries(self, embeddings: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Returns the vectors of queries [Q, D] that scores are computed with; they may have been cut already."""
    return embeddings if self.dims is None else scaled_prefix(embeddings, self.dims)

  def make_index(self, embeddings: np.ndarray, mesh: Mesh | None = None, rows: np.ndarray | None = None) -> Index:
    """Returns an index of vectors [n, D] in this form; its queries have dimension D.

    Args:
      embeddings: float32 [n, D], memory-mapped or not.
      mesh: Devices to search on; None uses all devices.
      rows: Ids to search, ascending; None searches all.
    """
    vectors = self.vectors(embeddings)
    if self.dtype == "float32":
      index: Index = ExactIndex(vectors, mesh, rows=rows)
    else:
      index = CompactIndex(vectors, self.dtype, mesh, rows=rows)
    return index if self.dims is None else _CutQueries(index, self)


class _CutQueries:
  """An index that is searched with the first dimensions of queries.

  Attributes:
    num_labels: Number of labels that are searched.
  """

  def __init__(self, index: Index, form: VectorForm):
    self._index, self._form = index, form
    self.num_labels = index.num_labels

  def search(self, queries: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns what the index finds for the cut queries [Q, D]."""
    return self._index.search(self._form.queries(queries), k)


WHOLE = VectorForm()
"""The form of an index as it is on disk."""
