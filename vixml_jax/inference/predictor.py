"""Prediction from a workdir: encodes queries, searches the label index, and returns uids and texts of labels."""

from collections.abc import Mapping, Sequence
import dataclasses
import logging
from typing import Any, Protocol

import jax
from jax.sharding import Mesh
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.files import fingerprint_of
from vixml_jax.inference.blend_ranking import BlendRanking, Dials
from vixml_jax.inference.predictions import Prediction, PredictionColumns
from vixml_jax.inference.queries import Query, query_format
from vixml_jax.inference.query_images import QueryImageEncoder, UnreadableImage, image_vectors
from vixml_jax.inference.rankings import AUGMENTED, BLEND, PLAIN
from vixml_jax.inference.trained_encoder import TrainedEncoder
from vixml_jax.ragged import Ragged
from vixml_jax.search import retrieval_augmented
from vixml_jax.search.filters import Filters
from vixml_jax.search.label_index import LabelIndex
from vixml_jax.search.retrieval_augmented import RetrievalSettings

_log = logging.getLogger(__name__)

GivenQuery = str | Mapping[str, Any] | Query


class LabelSearch(Protocol):
  """A search of the labels of an index, such as `LabelIndex.search`."""

  def __call__(
    self, queries: np.ndarray | jax.Array, k: int, filters: Filters | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids as `LabelIndex.search` does."""


@dataclasses.dataclass(frozen=True, repr=False)
class Predictor:
  """Answers queries; `load_predictor` makes it.

  Attributes:
    encoder: Encoder of texts and images.
    index: Index of the labels.
    image_encoder: Encoder of images to feature vectors; None for a model of texts only.
    retrieval: Settings of retrieval-augmented inference; None for another ranking.
    blend: The trained blend of the index; None for another ranking.
    label_search: Search of the labels to use instead of `index.search`.
  """

  encoder: TrainedEncoder
  index: LabelIndex
  image_encoder: QueryImageEncoder | None
  retrieval: RetrievalSettings | None
  blend: BlendRanking | None = None
  label_search: LabelSearch | None = None

  def __repr__(self) -> str:
    return (
      f"Predictor(workdir={str(self.encoder.workdir)!r}, step={self.encoder.checkpoint['step']}, "
      f"labels={self.index.num_live}, images={self.encoder.images}, search={self.index.search_kind!r}, "
      f"retrieval={self.retrieval}, blend={self.blend})"
    )

  @property
  def mesh(self) -> Mesh:
    """Devices that encode and search."""
    return self.encoder.mesh

  @property
  def ranking(self) -> str:
    """How labels are ranked, one of `RANKINGS`."""
    return BLEND if self.blend is not None else PLAIN if self.retrieval is None else AUGMENTED

  @property
  def hits(self) -> tuple[int, int]:
    """Numbers of labels and of training queries that the ranking looks up for each query; 0 and 0 for plain search."""
    if self.blend is not None:
      return self.blend.index.widths.labels, self.blend.index.widths.queries
    return (0, 0) if self.retrieval is None else (self.retrieval.hits, self.retrieval.num_query_hits)

  def with_index(self, index: LabelIndex, label_search: LabelSearch | None = None) -> "Predictor":
    """Returns the predictor with another snapshot of its index.

    Args:
      index: The snapshot.
      label_search: As the attribute.

    Raises:
      InputError: The ranking needs something that the snapshot lacks.
    """
    blend = self.blend and BlendRanking.open(index, self.blend.tail, self.blend.min_probability)
    return dataclasses.replace(self, index=index, blend=blend, label_search=label_search)

  def predict(self, queries: Sequence[GivenQuery], k: int = 10) -> list[list[Prediction]]:
    """Returns the k labels of highest score for each query.

    Args:
      queries: Each a text, or a dict with `title` and optionally `content`, `images` (a list of paths, bytes, Pillow
        images or feature vectors [F]), `allow` and `deny` (lists of uids of labels) and `categories`.
      k: Number of labels, at least 1; more than there are labels in the index gives all of them.

    Returns:
      For each query its labels, best first. There are fewer than k if filters leave fewer; with retrieval
      augmentation, if fewer have a share of probability; and with the blend, if there are fewer candidates of the
      probability that is asked for.

    Raises:
      InputError: A query is wrong (the message names its position from 0), or k is.
    """
    checked = self.checked(queries)
    k = self.capped_k(k)
    if not checked:
      return []
    texts = [query.text for query in checked]
    return self.named(*self.search(self.encode(checked), k, self.filters(checked), texts=texts))

  def checked(self, queries: Sequence[GivenQuery], first: int = 0) -> list[Query]:
    """Checks the queries of a call and returns them.

    Args:
      queries: Queries as for `predict`.
      first: Position of the first of them, which error messages count from.

    Raises:
      InputError: A query is wrong; the message names its position.
    """
    if isinstance(queries, str | Mapping):
      raise InputError("queries: must be a list of queries; put a single one into brackets")
    form = query_format(self.encoder.config)
    return [
      query if isinstance(query, Query) else form.parse(query, f"query {i}") for i, query in enumerate(queries, first)
    ]

  def capped_k(self, k: int) -> int:
    """Returns the number of labels to find where k are asked for: at most as many as there are, which is logged.

    Raises:
      InputError: It is below 1.
    """
    if k < 1:
      raise InputError(f"k={k}: must be at least 1")
    if k > self.index.num_live:
      _log.warning("k=%d: there are %d labels, so each query gets no more than these", k, self.index.num_live)
    return min(k, self.index.num_live)

  def encode(
    self,
    queries: Sequence[GivenQuery],
    *,
    tokens: Ragged | None = None,
    unreadable: list[UnreadableImage] | None = None,
    whole_chunks: bool = False,
  ) -> np.ndarray:
    """Returns embeddings of unit norm, float32 [Q, D].

    Args:
      queries: Queries as for `predict`.
      tokens: What `encoder.tokenizer` returned for the texts of the queries; None to tokenize them here.
      unreadable: List that images without pixels are appended to; their queries are encoded without them. None to
        raise an error for such an image.
      whole_chunks: See `TrainedEncoder.embed`.

    Raises:
      InputError: A query is wrong; the message names it.
    """
    checked = self.checked(queries)
    vectors = self.image_vectors(checked, unreadable) if self.encoder.images else None
    texts = [query.text for query in checked] if tokens is None else tokens
    return self.encoder.embed(texts, vectors, whole_chunks=whole_chunks)

  def filters(self, queries: Sequence[Query]) -> Filters | None:
    """Returns the labels that each query allows and denies, as ids; None if no query has a filter.

    Raises:
      InputError: A uid or a category is unknown; the message names it.
    """
    if not any(query.allow is not None or query.categories is not None or query.deny for query in queries):
      return None
    return self.index.filters(
      allow=[query.allow for query in queries],
      deny=[query.deny for query in queries],
      categories=[query.categories for query in queries],
    )

  def search(
    self,
    embeddings: np.ndarray,
    k: int,
    filters: Filters | None = None,
    *,
    texts: Sequence[str] | None = None,
    dials: Dials | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best labels of embedded queries.

    Args:
      embeddings: Embeddings [Q, D].
      k: Number of labels for each query.
      filters: Labels that each query may have, from `filters`.
      texts: Texts of the queries, which only the blend reads.
      dials: Settings of the blend for each query; None for those of `blend`.

    Returns:
      Scores float32 [Q, K] and ids int32 [Q, K], the best label first. Scores descend, unless the blend ranks with a
      `tail` above 0: its scores are probabilities. Score -inf and id -1 fill the places of a query with fewer labels.
    """
    search = self.label_search or self.index.search
    if self.retrieval is None and self.blend is None:
      return search(embeddings, k, filters)
    label_hits, query_hits = self.hits
    # The label search applies the filters too, so that a query with few allowed labels finds them.
    neighbors = retrieval_augmented.Neighbors(
      *search(embeddings, label_hits, filters), *self.index.query_index.search(embeddings, query_hits)
    )
    if self.blend is not None:
      if texts is None:
        raise ValueError("the blend needs the texts of the queries")
      return self.blend.rank(embeddings, neighbors, texts, k, filters, dials)
    assert self.retrieval is not None
    if self.retrieval.joint:
      # Training queries are not filtered. They would take the places of the few labels that a query may have.
      limited = None if filters is None or filters.allow is None else filters.allow.has_set
      neighbors = neighbors.nearest(self.retrieval.hits, None if limited is None else ~limited)
    return retrieval_augmented.combine(
      neighbors,
      self.index.query_labels,
      num_labels=self.index.num_labels,
      lambda_=self.retrieval.lambda_,
      temperature=self.retrieval.temperature,
      k=k,
      filters=filters,
    )

  def named(self, scores: np.ndarray, ids: np.ndarray) -> list[list[Prediction]]:
    """Returns results of `search` with uids and texts, without empty places."""
    return self.columns(scores, ids).rows()

  def columns(self, scores: np.ndarray, ids: np.ndarray) -> PredictionColumns:
    """Returns what `named` returns as columns."""
    filled = ids >= 0
    distinct, places = np.unique(ids[filled], return_inverse=True)
    labels = zip(self.index.uids(distinct), distinct.tolist(), self.index.texts(distinct), strict=True)
    return PredictionColumns(list(labels), places, scores[filled], filled.sum(axis=1))

  def settings(self) -> dict[str, Any]:
    """Returns all that determines an answer besides the query, as JSON."""
    form = self.index.form
    return {
      **self.encoder.settings(),
      "index": fingerprint_of(self.index.info),
      "retrieval": self.retrieval and dataclasses.asdict(self.retrieval),
      "blend": self.blend and {"tail": self.blend.tail, "min_probability": self.blend.min_probability},
      "mesh": dict(self.mesh.shape),
      "platform": jax.default_backend(),
      "search": self.index.search_kind,
      **({} if form.is_whole else {"index_dtype": form.dtype, "dims": form.dims}),
    }

  def image_vectors(self, queries: Sequence[Query], unreadable: list[UnreadableImage] | None) -> list[list[np.ndarray]]:
    """Returns the feature vectors of each query's images; the images of all queries are encoded together.

    Args:
      queries: Checked queries.
      unreadable: As for `encode`.

    Raises:
      InputError: An image has no pixels and `unreadable` is None.
    """
    assert self.image_encoder is not None  # A model that takes images has one.
    return image_vectors(self.image_encoder, queries, unreadable)
