"""Places labels on a plane so that labels with similar prototypes are near each other."""

import dataclasses
import importlib

import numpy as np

from vixml_jax.input.corpus import Corpus
from vixml_jax.stages import stage

MOST_LABELS = 1000
"""Number of labels on the map, the most frequent ones. The map of as many takes some seconds."""
_FEWEST_LABELS = 5


@dataclasses.dataclass(frozen=True)
class LabelMap:
  """Labels on a plane.

  Attributes:
    texts: Text of each label.
    frequencies: Its number of training queries.
    positions: float32 [P, 2].
  """

  texts: list[str]
  frequencies: list[int]
  positions: np.ndarray


def mapped_labels(frequencies: np.ndarray) -> np.ndarray:
  """Returns the labels that the map shows, int64 [P]: the most frequent ones, the lower id first among equals.

  Args:
    frequencies: Number of training queries of each label, int [L].
  """
  order = np.argsort(-frequencies, kind="stable")[:MOST_LABELS]
  return order if len(order) >= _FEWEST_LABELS else order[:0]


def label_map(corpus: Corpus, labels: np.ndarray, prototypes: np.ndarray) -> LabelMap:
  """Returns the map of some labels.

  Args:
    corpus: Data set with the texts of the labels.
    labels: The labels, int64 [P].
    prototypes: Their prototypes [P, D], of unit length.
  """
  frequencies = np.bincount(corpus.train_labels.values, minlength=corpus.num_labels)[labels]
  with stage(f"place {len(labels):,} labels on a map"):
    positions = _positions(prototypes)
  return LabelMap(corpus.label_text(labels.tolist()), frequencies.tolist(), positions)


def _positions(prototypes: np.ndarray) -> np.ndarray:
  """Returns positions float32 [P, 2] by t-SNE (van der Maaten and Hinton, 2008), from principal components."""
  if len(prototypes) < _FEWEST_LABELS:
    return np.zeros((len(prototypes), 2), np.float32)
  # Imported by name, as in the blend: the package starts faster, and without scikit-learn's threads.
  manifold = importlib.import_module("sklearn.manifold")
  perplexity = min(30.0, (len(prototypes) - 1) / 4)
  tsne = manifold.TSNE(init="pca", perplexity=perplexity, max_iter=500, random_state=0)
  return tsne.fit_transform(np.asarray(prototypes, np.float32)).astype(np.float32)
