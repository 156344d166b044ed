"""Ranks the labels of an index by its trained blend."""

from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from vixml_jax.blend.lexical import TfIdf, count_ngrams, keep_rows
from vixml_jax.blend.model import BlendModel, check_tail
from vixml_jax.blend.ranking import BlendIndex, ScoredCandidates
from vixml_jax.blend.settings import BlendSettings
from vixml_jax.datasets.propensity import inverse_propensity
from vixml_jax.errors import InputError
from vixml_jax.row_files import load_rows
from vixml_jax.search.filters import Filters
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import Neighbors
from vixml_jax.stages import stage


class Dials(NamedTuple):
  """Settings of the blend for each of Q queries.

  Attributes:
    tail: float64 [Q], 0 to 1, the dial from frequent to rare labels, see `blend.model.dial_scores`.
    min_probability: float64 [Q], 0 to 1. Labels of a lower probability are left out.
  """

  tail: np.ndarray
  min_probability: np.ndarray


@dataclasses.dataclass(frozen=True, repr=False)
class BlendRanking:
  """The blend of an index, ready to rank.

  Attributes:
    model: The trained model.
    tfidf: Weights of the words of queries.
    index: Words and labels of the training queries, without deleted labels.
    inverse_propensity: float64 [L], how much more a rare label counts.
    tail: The dial of queries that have none of their own.
    min_probability: The least probability of labels of queries that have none of their own.
  """

  model: BlendModel
  tfidf: TfIdf
  index: BlendIndex
  inverse_propensity: np.ndarray
  tail: float = 0.0
  min_probability: float = 0.0

  @classmethod
  def open(cls, labels: LabelIndex, tail: float = 0.0, min_probability: float = 0.0) -> "BlendRanking":
    """Returns the blend of an index.

    Args:
      labels: The index.
      tail: 0 to 1.
      min_probability: 0 to 1.

    Raises:
      InputError: The index has no blend, its libraries are not installed, or a setting is out of range.
    """
    check_dial(tail, min_probability)
    stored = labels.blend
    if stored is None:
      raise InputError(
        f"{labels.folder}: has no blend; where the data set is, run python -m vixml_jax.evaluate "
        f"--workdir={labels.folder.parent} --blend, or choose another ranking"
      )
    model, settings = BlendModel(stored.model), BlendSettings.from_json(stored.settings)
    with stage("index the words of labels and training queries"):
      index = BlendIndex.build(
        keep_rows(stored.words.labels, ~labels.deleted),
        stored.words.queries,
        labels.query_labels,
        settings.widths,
        None if stored.classifiers is None else load_rows(stored.classifiers).__getitem__,
      )
    _ = labels.query_index  # Opened now, because the next snapshot removes its files.
    propensity = inverse_propensity(
      index.frequencies, len(labels.query_labels), settings.propensity_a, settings.propensity_b
    )
    return cls(model, TfIdf(np.asarray(stored.idf)), index, propensity, tail, min_probability)

  def __repr__(self) -> str:
    return f"BlendRanking(tail={self.tail}, min_probability={self.min_probability})"

  def rank(
    self,
    embeddings: np.ndarray,
    found: Neighbors,
    texts: Sequence[str],
    k: int,
    filters: Filters | None,
    dials: Dials | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best labels of Q queries.

    Args:
      embeddings: Embeddings of the queries [Q, D].
      found: Labels and training queries by embedding, as many as `index.widths` asks for.
      texts: Texts of the queries.
      k: Number of labels.
      filters: Labels that each query may have.
      dials: Settings for each query; None for those of this ranking.

    Returns:
      Probabilities float32 [Q, K] and ids int32 [Q, K] as `ScoredCandidates.ranked` returns them.
    """
    vectors = self.tfidf.vectors(count_ngrams([texts], len(self.tfidf.idf)))
    scored = ScoredCandidates.score(self.model, *self.index.described(embeddings, found, vectors, filters=filters))
    tail, least = (self.tail, self.min_probability) if dials is None else dials
    return scored.ranked(k, self.inverse_propensity, tail=tail, min_probability=least)


def check_dial(tail: float, min_probability: float) -> None:
  """Checks both settings of a ranking.

  Raises:
    InputError: One of them is out of range.
  """
  check_tail(tail)
  if not 0 <= min_probability <= 1:
    raise InputError(f"min_probability is {min_probability}: it must be between 0 and 1")
