"""What an index holds for the blend, and its files: TF-IDF vectors of labels and training queries, and the model.

The files are part of a snapshot (see `label_index_files`):

  blend_model.txt            the trained model
  word_idf.npy               float32 [F], inverse document frequency of each column of the vectors
  label_words, query_words   ragged int32, the columns of each label's and each training query's vector
  label_words.weights.npy    float32, the value at each of these columns; the same for query_words
  classifiers.npy            float32 [L, D + 1], if labels have classifiers: vector and bias of each, see
                             `blend.classifiers`; NaN for labels that were added later

The settings of the blend are in index.json.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from vixml_jax.ragged import Ragged
from vixml_jax.row_files import RowFiles, save_rows

MODEL, IDF = "blend_model.txt", "word_idf.npy"
LABEL_WORDS, QUERY_WORDS = "label_words", "query_words"
CLASSIFIERS = "classifiers.npy"


class WordVectors(NamedTuple):
  """TF-IDF vectors of L labels and N training queries.

  Attributes:
    labels: float32 [L, F].
    queries: float32 [N, F].
  """

  labels: scipy.sparse.csr_array
  queries: scipy.sparse.csr_array


@dataclasses.dataclass(frozen=True)
class StoredBlend:
  """A trained blend, as an index holds it.

  Attributes:
    model: The trained model, as text.
    idf: float32 [F], inverse document frequency of each column.
    words: Vectors of all labels and training queries, deleted labels included.
    settings: Settings of candidates and propensities, as JSON.
    classifiers: float32 [L, D + 1], in memory or in files; None if labels have none.
  """

  model: str
  idf: np.ndarray
  words: WordVectors
  settings: dict[str, Any]
  classifiers: np.ndarray | RowFiles | None = None

  def save(self, folder: Path) -> None:
    """Writes the files."""
    (folder / MODEL).write_text(self.model, encoding="utf-8")
    np.save(folder / IDF, self.idf)
    save_vectors(self.words.labels, folder / LABEL_WORDS)
    save_vectors(self.words.queries, folder / QUERY_WORDS)
    if self.classifiers is not None:
      save_rows(folder / CLASSIFIERS, self.classifiers)

  @classmethod
  def open(cls, folder: Path, settings: dict[str, Any]) -> "StoredBlend":
    """Maps the files that `save` wrote."""
    idf = np.load(folder / IDF, mmap_mode="r", allow_pickle=False)
    words = WordVectors(*(_load_vectors(folder / name, len(idf)) for name in (LABEL_WORDS, QUERY_WORDS)))
    classifiers = None
    if (folder / CLASSIFIERS).exists():
      classifiers = np.load(folder / CLASSIFIERS, mmap_mode="r", allow_pickle=False)
    return cls((folder / MODEL).read_text(encoding="utf-8"), idf, words, settings, classifiers)


def save_vectors(vectors: scipy.sparse.csr_array, path: Path) -> None:
  """Writes sparse vectors as ragged columns, and their values to `PATH.weights.npy`."""
  Ragged(vectors.indices.astype(np.int32), vectors.indptr.astype(np.int64)).save(path)
  np.save(_weights_of(path), np.asarray(vectors.data, np.float32))


def joined(first: scipy.sparse.csr_array, second: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
  """Returns the rows of both matrices."""
  return scipy.sparse.csr_array(scipy.sparse.vstack([first, second], format="csr"))


def _load_vectors(path: Path, num_columns: int) -> scipy.sparse.csr_array:
  columns = Ragged.load(path)
  weights = np.load(_weights_of(path), mmap_mode="r", allow_pickle=False)
  return scipy.sparse.csr_array((weights, columns.values, columns.offsets), shape=(len(columns), num_columns))


def _weights_of(path: Path) -> Path:
  return path.with_name(f"{path.name}.weights.npy")
